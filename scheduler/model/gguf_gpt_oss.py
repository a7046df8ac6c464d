"""gpt-oss from a GGUF file: its config, and its weights as a checkpoint whose experts keep their MXFP4 blocks.

transformers knows the names of other experts only, and would widen all of them at once.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from softbatch.scheduler.model.gguf_metadata import GgufFile
from softbatch.scheduler.model.gguf_tensors import GgufTensors
from softbatch.scheduler.model.model_error import ModelError
from softbatch.scheduler.model.mxfp4 import BLOCKS, SCALES, from_gguf_rows, is_in_blocks

logger = logging.getLogger(__name__)

_NUMBERS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "expert_feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.sliding_window": "sliding_window",
    "expert_count": "num_local_experts",
    "expert_used_count": "num_experts_per_tok",
}
_FREQUENCIES, _SCALING = "rope.freq_base", "rope.scaling."
# What files leave out of how these models stretch positions.
_STRETCHED = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
_TOKENS = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "padding_token_id": "pad_token_id"}
_EMBEDDING, _HEAD = "token_embd.weight", "output.weight"
_OUTER = {_EMBEDDING: "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight", _HEAD: "lm_head.weight"}
_OF_LAYER = {
    "attn_norm.weight": "input_layernorm.weight",
    "post_attention_norm.weight": "post_attention_layernorm.weight",
    "attn_sinks.weight": "self_attn.sinks",
    "ffn_gate_inp.weight": "mlp.router.weight",
    "ffn_gate_inp.bias": "mlp.router.bias",
    **{
        f"attn_{short}.{part}": f"self_attn.{name}_proj.{part}"
        for short, name in (("q", "q"), ("k", "k"), ("v", "v"), ("output", "o"))
        for part in ("weight", "bias")
    },
}
# Matrices of experts: one, or two whose rows alternate.
_EXPERTS = {"gate_up_proj": ("ffn_gate_exps", "ffn_up_exps"), "down_proj": ("ffn_down_exps",)}
_KEPT = "MXFP4"  # the kind of theirs that checkpoints have too
_ROWS_AT_ONCE = 8192  # so that no large matrix lies in memory in float32


def config_of(file: GgufFile, tensors: GgufTensors) -> Any:
    """Raises ModelError where the file lacks a number."""
    from transformers import GptOssConfig

    said = file.of_model()
    missing = next((name for name in (*_NUMBERS, _FREQUENCIES) if name not in said), None)
    if missing is not None:
        raise ModelError(f"the file lacks {file.architecture}.{missing}")
    layers, experts, used = (said[name] for name in ("block_count", "expert_count", "expert_used_count"))
    for name, number, most in (("block_count", layers, len(tensors.names)), ("expert_used_count", used, experts)):
        if not 1 <= number <= most:
            raise ModelError(f"{file.architecture}.{name} is {number}, and must lie between 1 and {most}")
    rotary: dict[str, Any] = {"rope_type": "default", "rope_theta": float(said[_FREQUENCIES])}
    if said.get(f"{_SCALING}type") == "yarn":  # whose numbers complete_config puts in
        rotary |= {"rope_type": "yarn", "factor": said.get(f"{_SCALING}factor", 1.0)} | _STRETCHED
    tokens = {field: file.of_tokenizer(name) for name, field in _TOKENS.items()}
    in_blocks = {} if _widened(tensors, layers) else {"quantization_config": {"quant_method": "mxfp4"}}
    return GptOssConfig(
        architectures=["GptOssForCausalLM"],
        vocab_size=_shape(tensors, _EMBEDDING)[0],
        tie_word_embeddings=_HEAD not in tensors.names,
        rope_parameters=rotary,
        **{field: said[name] for name, field in _NUMBERS.items()},
        **{field: token for field, token in tokens.items() if token is not None},
        **in_blocks,
    )


def convert(tensors: GgufTensors, config: Any, target: Path) -> None:
    """Writes config and weights, those of one layer at a time. Raises ModelError for tensors that the model has not."""
    keeps_blocks = is_in_blocks(config)
    if not keeps_blocks:
        first = _widened(tensors, config.num_hidden_layers)
        logger.warning(
            "%s is not in MXFP4: all experts are widened to bfloat16, which takes four times the memory", first
        )
    _refuse_others(tensors, config.num_hidden_layers)
    written: dict[str, str] = {}
    size = 0
    for number, weights in enumerate(_pieces(tensors, config.num_hidden_layers, keeps_blocks), 1):
        name = f"model-{number:05d}-of-{config.num_hidden_layers + 1:05d}.safetensors"
        _save(weights, target / name)
        written |= dict.fromkeys(weights, name)
        size += sum(weight.nbytes for weight in weights.values())
    index = {"metadata": {"total_size": size}, "weight_map": written}
    (target / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    config.dtype = torch.bfloat16
    config.save_pretrained(str(target))


def _save(weights: dict[str, torch.Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    save_file({name: weight.contiguous() for name, weight in weights.items()}, path, {"format": "pt"})


def _pieces(tensors: GgufTensors, layers: int, keeps_blocks: bool) -> Iterator[dict[str, torch.Tensor]]:
    """What is in no layer, then each layer."""
    yield {
        name: _values(tensors, origin) for origin, name in _OUTER.items() if origin != _HEAD or origin in tensors.names
    }
    for layer in range(layers):
        own, prefix = f"blk.{layer}.", f"model.layers.{layer}."
        found = {prefix + name: _values(tensors, own + origin) for origin, name in _OF_LAYER.items()}
        for name, origins in _EXPERTS.items():
            at = f"{prefix}mlp.experts.{name}"
            biases = [_values(tensors, f"{own}{origin}.bias") for origin in origins]
            found[f"{at}_bias"] = _alternating(biases)
            if keeps_blocks:
                pairs = [_in_blocks(tensors, f"{own}{origin}.weight") for origin in origins]
                found[at + BLOCKS] = _alternating([blocks for blocks, _ in pairs])
                found[at + SCALES] = _alternating([scales for _, scales in pairs])
            else:
                matrices = [_values(tensors, f"{own}{origin}.weight") for origin in origins]
                found[at] = _alternating(matrices).transpose(1, 2)
        yield found


def _alternating(parts: list[torch.Tensor]) -> torch.Tensor:
    """[experts, outputs, ...] each; an output of the first, then the same of the second."""
    return torch.stack(parts, 2).flatten(1, 2)


def _widened(tensors: GgufTensors, layers: int) -> str | None:
    """The first of the experts' matrices that is not in MXFP4: then all are widened, as no checkpoint has only some in
    blocks."""
    kinds, origins = tensors.kinds(), [origin for each in _EXPERTS.values() for origin in each]
    names = (f"blk.{layer}.{origin}.weight" for layer in range(layers) for origin in origins)
    return next((name for name in names if name not in kinds or kinds[name][0] != _KEPT), None)


def _refuse_others(tensors: GgufTensors, layers: int) -> None:
    experts = {f"{origin}.{part}" for each in _EXPERTS.values() for origin in each for part in ("weight", "bias")}
    known = {f"blk.{layer}.{name}" for layer in range(layers) for name in (*_OF_LAYER, *experts)}
    other = sorted(tensors.names - known - _OUTER.keys())
    if other:
        raise ModelError(f"the file has {other[0]}, which the model that its metadata describes has not")


def _shape(tensors: GgufTensors, name: str) -> tuple[int, ...]:
    if name not in tensors.names:
        raise ModelError(f"the file lacks {name}")
    return tensors.shape(name)


def _in_blocks(tensors: GgufTensors, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks and scales, [experts, outputs, ...]."""
    experts, outputs, _ = _shape(tensors, name)
    found = tensors.rows(name)
    assert found is not None
    blocks, scales = from_gguf_rows(torch.from_numpy(found[2]))
    return blocks.unflatten(0, (experts, outputs)), scales.unflatten(0, (experts, outputs))


def _values(tensors: GgufTensors, name: str) -> torch.Tensor:
    """In bfloat16. Raises ModelError."""
    import gguf

    shape, found = _shape(tensors, name), tensors.rows(name)
    assert found is not None
    kind, _, rows = found
    values = torch.empty(rows.shape[0], shape[-1], dtype=torch.bfloat16)
    for first in range(0, rows.shape[0], _ROWS_AT_ONCE):
        piece = rows[first : first + _ROWS_AT_ONCE]
        widened = gguf.dequantize(piece, gguf.GGMLQuantizationType[kind])
        values[first : first + piece.shape[0]] = torch.from_numpy(widened).view(piece.shape[0], -1)
    return values.view(shape)
