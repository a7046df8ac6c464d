"""Llama-like models on CPUs: the whole decoder in one C++ call, over weights laid out once for it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import psutil
import torch
from torch import nn

from softbatch.scheduler.model.batch import RaggedBatch
from softbatch.scheduler.model.cpu import ops
from softbatch.scheduler.model.cpu.formats import WeightFormat
from softbatch.scheduler.model.kv_cache import KVCache
from softbatch.scheduler.model.source import ModelError

# Their layers are RMSNorm, attention with rotary positions, RMSNorm, SwiGLU; biases and norms of heads may be there.
ARCHITECTURES = frozenset({"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"})
# Their frequencies are the same at every length.
_ROTARY = frozenset({"default", "linear", "llama3", "yarn"})
_AS_IT_IS = {torch.float32: WeightFormat.FLOAT32, torch.bfloat16: WeightFormat.BFLOAT16}
# Rows from which on a step waits for arithmetic: weights that must be taken apart first are the slower ones then.
LONG_STEP = 33


def supports(model: Any, dtype: torch.dtype) -> bool:
    """Whether `DecoderForward` computes this model, if the kernels can be built. Pure: it compiles nothing."""
    config = model.config
    rope = getattr(config, "rope_parameters", None) or {}
    return bool(
        type(model).__name__ in ARCHITECTURES
        and dtype in _AS_IT_IS
        and model.device.type == "cpu"
        and config.hidden_act == "silu"
        and not getattr(config, "mlp_bias", False)
        and rope.get("rope_type", "default") in _ROTARY
        and config.hidden_size % 2 == config.intermediate_size % 2 == 0
        and all(_is_plain(linear, dtype) for linear in _linears(model))
    )


def plain_weights(dtype: torch.dtype) -> WeightFormat:
    """How weights that are not quantised lie in memory on this machine: the same numbers, whichever it is."""
    if dtype == torch.bfloat16 and ops.has_12_bits():
        return WeightFormat.BFLOAT16_IN_12_BITS
    return _AS_IT_IS[dtype]


def unsupported_option_error(named: str, model: Any, instead: str) -> ModelError:
    """What to say where an option takes `DecoderForward` and the model does not run so."""
    dtype = str(model.dtype).removeprefix("torch.")
    return ModelError(
        f"{named} takes a CPU, a C++ compiler, --dtype float32 or bfloat16, and a model of "
        f"{', '.join(sorted(ARCHITECTURES))}; this is {type(model).__name__} in {dtype} "
        f"on {model.device.type}: use {instead}"
    )


def _linears(model: Any) -> Iterator[Any]:
    for layer in model.model.layers:
        yield from (getattr(layer.self_attn, name) for name in ("q_proj", "k_proj", "v_proj", "o_proj"))
        yield from (getattr(layer.mlp, name) for name in ("gate_proj", "up_proj", "down_proj"))
    yield model.lm_head


def _is_plain(linear: Any, dtype: torch.dtype) -> bool:
    """Not what an adapter or a quantiser has put in its place, whose weight alone says too little."""
    return type(linear) is nn.Linear and type(linear.weight) is nn.Parameter and linear.weight.dtype == dtype


def _has_room_for_a_copy(model: Any) -> bool:
    """Whether one more copy of the weights would hardly be felt: a 32nd of the machine's memory, an eighth of what is
    free."""
    copy, memory = sum(linear.weight.nbytes for linear in _linears(model)), psutil.virtual_memory()
    return bool(copy <= min(memory.total // 32, memory.available // 8))


def _make_decoder(model: Any, kv_cache: KVCache, weights: WeightFormat) -> Any:
    config, rotary, attention = model.config, model.model.rotary_emb, model.model.layers[0].self_attn
    return ops.make_decoder(
        weights,
        kv_cache.dtype,
        config.num_attention_heads,
        config.num_key_value_heads,
        attention.head_dim,
        config.rms_norm_eps,
        attention.scaling,
        rotary.inv_freq,
        rotary.attention_scaling,
        kv_format=kv_cache.format.kv_format,
    )


def layer_weights(layer: Any) -> dict[str, torch.Tensor]:
    """What a layer has of weights, biases and norms, by the names in csrc/llama/layer_weights.h."""
    attention, mlp = layer.self_attn, layer.mlp
    linears = {
        "query": attention.q_proj,
        "key": attention.k_proj,
        "value": attention.v_proj,
        "output": attention.o_proj,
        "gate": mlp.gate_proj,
        "up": mlp.up_proj,
        "down": mlp.down_proj,
    }
    norms = {
        "input_norm": layer.input_layernorm,
        "mlp_norm": layer.post_attention_layernorm,
        "query_norm": getattr(attention, "q_norm", None),
        "key_norm": getattr(attention, "k_norm", None),
    }
    weights = {name: module.weight for name, module in (linears | norms).items() if module is not None}
    return weights | {f"{name}_bias": linear.bias for name, linear in linears.items() if linear.bias is not None}


def release_linears(layer: Any) -> None:
    """Give back the weights that the kernels have their own copy of: the layer cannot run any more."""
    for linear in (*layer.self_attn.children(), *layer.mlp.children()):
        if isinstance(linear, nn.Linear):
            linear.register_parameter("weight", None)


class DecoderForward:
    """`Forward` in C++. It has its own copy of the weights, as `weights` says: float32, bfloat16, the same in 12 bits
    or int8; by default as `plain_weights` has it, and if that is 12 bits and memory is plenty, in 16 bits too, for
    steps of LONG_STEP rows and more: results are the same bit for bit.

    With `release` the model's own go layer by layer, so that they never all lie beside their copies; it cannot run any
    more.
    """

    def __init__(
        self, model: Any, kv_cache: KVCache, weights: WeightFormat | None = None, release: bool = False
    ) -> None:
        self._embed = model.get_input_embeddings()
        self.weights = weights or plain_weights(kv_cache.dtype)
        also = weights is None and self.weights is WeightFormat.BFLOAT16_IN_12_BITS and _has_room_for_a_copy(model)
        self.weights_of_long_steps = _AS_IT_IS[kv_cache.dtype] if also else self.weights
        formats = dict.fromkeys((self.weights, self.weights_of_long_steps))
        decoders = {each: _make_decoder(model, kv_cache, each) for each in formats}
        for layer, keys, values in zip(model.model.layers, kv_cache.keys, kv_cache.values, strict=True):
            for decoder in decoders.values():
                decoder.add_layer(layer_weights(layer), keys, values)
            if release:
                release_linears(layer)
        for decoder in decoders.values():
            decoder.set_head(model.model.norm.weight, model.lm_head.weight, model.lm_head.bias)
        self._decoder, self._decoder_of_long_steps = decoders[self.weights], decoders[self.weights_of_long_steps]

    def __call__(self, batch: RaggedBatch) -> torch.Tensor:
        inputs = self._embed(batch.token_ids)
        for first, embeddings in batch.embeddings:
            inputs[first : first + embeddings.shape[0]] = embeddings
        attention = batch.attention
        decoder = self._decoder if inputs.shape[0] < LONG_STEP else self._decoder_of_long_steps
        logits: torch.Tensor = decoder.forward(
            inputs,
            batch.positions,
            attention.query_start,
            attention.context_len,
            attention.block_table,
            attention.slot_mapping,
            batch.logit_rows,
            attention.decodes,
            attention.joins_ranges,
        )
        return logits
