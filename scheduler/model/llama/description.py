"""What each family's decoder is put together of, for the kernels in C++. A new family is an entry of FAMILIES."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from softbatch.scheduler.model.family import Family
from softbatch.scheduler.model.gguf_weights import Blocks, GgufWeights
from softbatch.scheduler.model.key_offsets import KeyOffsets

# Norms by their names in csrc/llama/layer_weights.h, and the modules of a layer that they are.
BEFORE = {"input_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
BEHIND = {"attended_norm": "post_attention_layernorm", "mlp_output_norm": "post_feedforward_layernorm"}
AROUND = BEHIND | {"input_norm": "input_layernorm", "mlp_norm": "pre_feedforward_layernorm"}
# Their frequencies are the same in all sequences, or the one or the other.
_ROTARY = frozenset({"default", "linear", "llama3", "yarn", "longrope"})
_MLP = frozenset({"gate", "up", "down"})


@dataclass(frozen=True)
class DecoderParts:
    """How a family differs from Llama. What its layers tell themselves, such as biases, heads' norms, windows and which
    of them turn positions, is not said here.

    `numbers` are fields of the config by their names in csrc/llama/decoder_shape.h.
    """

    norms: Mapping[str, str] = field(default_factory=lambda: BEFORE)
    norm_offset: float = 0.0  # what is added to the weights of all norms
    numbers: Mapping[str, str] = field(default_factory=dict)
    divides_logits: str | None = None  # a field of the config


FAMILIES: Mapping[str, DecoderParts] = {
    **dict.fromkeys(
        (
            "LlamaForCausalLM",
            "MinistralForCausalLM",
            "MistralForCausalLM",
            "Phi3ForCausalLM",
            "Qwen2ForCausalLM",
            "Qwen3ForCausalLM",
            "SmolLM3ForCausalLM",
        ),
        DecoderParts(),
    ),
    "GemmaForCausalLM": DecoderParts(norm_offset=1.0),
    "Gemma2ForCausalLM": DecoderParts(
        AROUND, 1.0, {"softcap": "attn_logit_softcapping", "logit_softcap": "final_logit_softcapping"}
    ),
    "Gemma3ForCausalLM": DecoderParts(AROUND, 1.0, {"logit_softcap": "final_logit_softcapping"}),
    "GraniteForCausalLM": DecoderParts(
        numbers={"embedding_scale": "embedding_multiplier", "residual_scale": "residual_multiplier"},
        divides_logits="logits_scaling",
    ),
    "Olmo2ForCausalLM": DecoderParts(BEHIND),
    "Olmo3ForCausalLM": DecoderParts(BEHIND),
}


def parts_of(model: Any) -> DecoderParts | None:
    """None for a family without a description."""
    return FAMILIES.get(type(model).__name__)


def is_described(model: Any) -> bool:
    """Whether the kernels know every part of this model."""
    config = model.config
    return bool(
        parts_of(model) is not None
        and all(rotary.kind in _ROTARY for rotary in Family.of(config).rotary)
        and config.hidden_size % 2 == config.intermediate_size % 2 == 0
        and all(activation_of(layer.mlp) is not None for layer in model.model.layers[:1])
        and all(
            linear.bias is None for layer in model.model.layers for linear, names in linears(layer) if names[0] in _MLP
        )
    )


def is_plain(model: Any) -> bool:
    """Whether all layers are alike and as Llama's, but for windows: what the kernels for training know, which leave
    attention to others."""
    if not is_described(model):
        return False
    shape, (frequencies, _), layers = shape_of(model), rotary_of(model), model.model.layers
    return bool(
        parts_of(model) == DecoderParts()
        and not shape["gelu"]
        and 2 * frequencies.shape[1] == shape["head_dim"]
        and all(scheme == 0 for scheme in rotary_of_layers(model))
        and not hasattr(layers[0].self_attn, "q_norm")
    )


def shape_of(model: Any) -> dict[str, float]:
    """The numbers that all layers have in common, by the names in csrc/llama/decoder_shape.h."""
    config, attention, parts = model.config, model.model.layers[0].self_attn, parts_of(model) or DecoderParts()
    plain = {"softcap": 0.0, "embedding_scale": 1.0, "residual_scale": 1.0, "logit_scale": 1.0, "logit_softcap": 0.0}
    given = {name: getattr(config, of_config) for name, of_config in parts.numbers.items()}
    if parts.divides_logits is not None:
        given["logit_scale"] = 1 / getattr(config, parts.divides_logits)
    family = Family.of(config)
    return {
        "heads": float(family.num_heads),
        "kv_heads": float(family.num_kv_heads),
        "head_dim": float(family.head_dim),
        "epsilon": float(config.rms_norm_eps),
        "attention_scale": float(attention.scaling),
        "gelu": float(activation_of(model.model.layers[0].mlp) == "gelu"),
        **plain,
        **{name: float(value) for name, value in given.items() if value is not None},
    }


def rotary_of(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Frequencies [schemes, half] and scales [schemes] of rotary positions; of short sequences, where there are two."""
    rotary, names = model.model.rotary_emb, _schemes(model)
    # Where there are, transformers has those of its last call in the other buffer.
    own = "inv_freq" if Family.of(model.config).length_rule is None else "original_inv_freq"
    frequencies = torch.stack([getattr(rotary, f"{name}{own}") for name in names])
    return frequencies, torch.tensor([float(getattr(rotary, f"{name}attention_scaling")) for name in names])


def long_rotary_of(model: Any) -> torch.Tensor | None:
    """The frequencies of long sequences, where theirs are others, once `keep_long_frequencies` has kept them."""
    if Family.of(model.config).length_rule is None:
        return None
    rotary, short = model.model.rotary_emb, "original_inv_freq"  # also long ones of a scheme that knows no lengths
    return torch.stack(
        [getattr(rotary, f"{name}long_inv_freq", getattr(rotary, name + short)) for name in _schemes(model)]
    )


def rotary_of_layers(model: Any) -> list[int]:
    """Each layer's scheme, as `rotary_of` counts them; -1 for a layer whose tokens have no positions."""
    names = _schemes(model)
    return [
        (names.index(f"{kind}_") if names != [""] else 0) if getattr(layer.self_attn, "use_rope", True) else -1
        for layer, kind in zip(model.model.layers, _kinds(model), strict=True)
    ]


def key_offsets_of(model: Any) -> KeyOffsets | None:
    """The biases of keys, which some families have many times as large as the rest of a key; None where there are none,
    or where a norm behind them makes them differ from key to key, or how long a sequence is."""
    if Family.of(model.config).length_rule is not None:
        return None
    layers, parts, shape = model.model.layers, FAMILIES[type(model).__name__], shape_of(model)
    weights = [layer_weights(layer, parts) for layer in layers]
    if not all("key_bias" in each and "key_norm" not in each for each in weights):
        return None
    offsets = torch.stack([each["key_bias"].float() for each in weights])
    return KeyOffsets(
        offsets.view(len(layers), int(shape["kv_heads"]), int(shape["head_dim"])),
        *rotary_of(model),
        tuple(rotary_of_layers(model)),
    )


def norm_of(parts: DecoderParts, norm: Any) -> torch.Tensor:
    """The weights that a norm multiplies with."""
    weight: torch.Tensor = norm.weight
    return weight.float() + parts.norm_offset if parts.norm_offset else weight


def linears(layer: Any) -> Iterator[tuple[Any, tuple[str, ...]]]:
    """A layer's products, each with the names of those in csrc/llama/layer_weights.h that it is made of."""
    made_of = {
        layer.self_attn: {
            "qkv_proj": ("query", "key", "value"),
            "q_proj": ("query",),
            "k_proj": ("key",),
            "v_proj": ("value",),
            "o_proj": ("output",),
        },
        layer.mlp: {"gate_up_proj": ("gate", "up"), "gate_proj": ("gate",), "up_proj": ("up",), "down_proj": ("down",)},
    }
    for block, products in made_of.items():
        yield from ((getattr(block, name), names) for name, names in products.items() if hasattr(block, name))


def layer_weights(layer: Any, parts: DecoderParts) -> dict[str, torch.Tensor]:
    """What a layer has of weights, biases and norms, by the names in csrc/llama/layer_weights.h."""
    attention = layer.self_attn
    weights: dict[str, torch.Tensor] = {}
    for linear, names in linears(layer):
        for suffix, tensor in (("", linear.weight), ("_bias", linear.bias)):
            if tensor is not None:
                pieces = zip(names, _pieces(tensor, names, attention), strict=True)
                weights |= {f"{name}{suffix}": piece for name, piece in pieces}
    norms = {name: getattr(layer, module) for name, module in parts.norms.items()}
    if hasattr(attention, "q_norm"):
        norms |= {"query_norm": attention.q_norm, "key_norm": attention.k_norm}
    return weights | {name: norm_of(parts, norm) for name, norm in norms.items()}


def layer_blocks(layer: Any, weights: GgufWeights) -> dict[str, Blocks]:
    """A layer's products as the file has them, by the same names."""
    found: dict[str, Blocks] = {}
    for linear, names in linears(layer):
        blocks = weights.of(linear)
        pieces = _pieces(blocks.data, names, layer.self_attn)
        found |= {name: Blocks(piece, blocks.kind) for name, piece in zip(names, pieces, strict=True)}
    return found


def _pieces(tensor: Any, names: tuple[str, ...], attention: Any) -> Any:
    """Of a product that is several in one."""
    rows = tensor.shape[0]
    if len(names) < 3:
        return tensor.split(rows // len(names))
    of_keys = attention.num_key_value_heads * attention.head_dim
    return tensor.split([rows - 2 * of_keys, of_keys, of_keys])


def activation_of(mlp: Any) -> str | None:
    """That of the gate; None for one that the kernels have not."""
    function = getattr(mlp, "act_fn", None) or getattr(mlp, "activation_fn", None)
    if not isinstance(function, nn.Module):
        return None
    numbers = torch.linspace(-4, 4, 9)
    found = function(numbers)
    known = {"silu": F.silu(numbers), "gelu": F.gelu(numbers, approximate="tanh")}
    return next((name for name, expected in known.items() if torch.allclose(found, expected, atol=1e-6)), None)


def _schemes(model: Any) -> list[str]:
    """What the rotary module's attributes begin with: nothing where all layers are alike, or kinds of layers."""
    if hasattr(model.model.rotary_emb, "inv_freq"):
        return [""]
    return [f"{kind}_" for kind in dict.fromkeys(_kinds(model))]


def _kinds(model: Any) -> list[str]:
    kinds = getattr(model.config, "layer_types", None)
    return list(kinds) if kinds else ["full_attention"] * len(model.model.layers)
