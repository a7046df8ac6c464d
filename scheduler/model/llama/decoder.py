"""Decoders of described families on CPUs: the whole decoder in one C++ call, over weights laid out once for it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import psutil
import torch
from torch import nn

from softbatch.scheduler.model.batch import RaggedBatch
from softbatch.scheduler.model.cpu import ops
from softbatch.scheduler.model.cpu.formats import WeightFormat
from softbatch.scheduler.model.family import Family
from softbatch.scheduler.model.gguf_weights import GgufWeights
from softbatch.scheduler.model.kv_cache import KVCache
from softbatch.scheduler.model.llama.description import (
    FAMILIES,
    is_described,
    layer_blocks,
    layer_weights,
    linears,
    long_rotary_of,
    norm_of,
    rotary_of,
    rotary_of_layers,
    shape_of,
)
from softbatch.scheduler.model.source import ModelError

_AS_IT_IS = {torch.float32: WeightFormat.FLOAT32, torch.bfloat16: WeightFormat.BFLOAT16}
# Rows from which on a step waits for arithmetic: weights that must be taken apart first are the slower ones then.
LONG_STEP = 33


def supports(model: Any, dtype: torch.dtype) -> bool:
    """Whether `DecoderForward` computes this model, if the kernels can be built. Pure: it compiles nothing."""
    return bool(
        dtype in _AS_IT_IS
        and model.device.type == "cpu"
        and is_described(model)
        and all(_is_plain(linear, dtype) for linear in products(model))
    )


def plain_weights(dtype: torch.dtype) -> WeightFormat:
    """How weights that are not quantised lie in memory on this machine: the same numbers, whichever it is."""
    if dtype == torch.bfloat16 and ops.has_12_bits():
        return WeightFormat.BFLOAT16_IN_12_BITS
    return _AS_IT_IS[dtype]


def may_support(family: str, dtype: torch.dtype) -> bool:
    """Whether a model of this class may be supported, before there is one."""
    return family in FAMILIES and dtype in _AS_IT_IS


def unsupported_option_error(named: str, model: Any, instead: str) -> ModelError:
    """What to say where an option takes `DecoderForward` and the model does not run so."""
    return unsupported_family_error(named, type(model).__name__, model.dtype, instead, model.device.type)


def unsupported_family_error(
    named: str, family: str, dtype: torch.dtype, instead: str, device: str = "cpu"
) -> ModelError:
    return ModelError(
        f"{named} takes a CPU, a C++ compiler, --dtype float32 or bfloat16, and a model of "
        f"{', '.join(sorted(FAMILIES))}; this is {family} in {str(dtype).removeprefix('torch.')} "
        f"on {device}: use {instead}"
    )


def products(model: Any) -> Iterator[Any]:
    """All linear modules whose weights the decoder has its own copy of."""
    for layer in model.model.layers:
        yield from (linear for linear, _ in linears(layer))
    yield model.lm_head


def _is_plain(linear: Any, dtype: torch.dtype) -> bool:
    """Not what an adapter or a quantiser has put in its place, whose weight alone says too little."""
    return type(linear) is nn.Linear and type(linear.weight) is nn.Parameter and linear.weight.dtype == dtype


def _has_room_for_a_copy(model: Any) -> bool:
    """Whether one more copy of the weights would hardly be felt: a 32nd of the machine's memory, an eighth of what is
    free."""
    copy, memory = sum(linear.weight.nbytes for linear in products(model)), psutil.virtual_memory()
    return bool(copy <= min(memory.total // 32, memory.available // 8))


def _make_decoder(model: Any, kv_cache: KVCache, weights: WeightFormat) -> Any:
    return ops.make_decoder(
        weights,
        kv_cache.dtype,
        shape_of(model),
        *rotary_of(model),
        kv_format=kv_cache.format.kv_format,
        long_frequencies=long_rotary_of(model),
    )


def release_linears(layer: Any) -> None:
    """Give back the weights that the kernels have their own copy of: the layer cannot run any more."""
    for linear in (*layer.self_attn.children(), *layer.mlp.children()):
        if isinstance(linear, nn.Linear):
            linear.register_parameter("weight", None)


class DecoderForward:
    """`Forward` in C++. It has its own copy of the weights, as `weights` says: float32, bfloat16, the same in 12 bits
    or int8; by default as `plain_weights` has it, and if that is 12 bits and memory is plenty, in 16 bits too, for
    steps of LONG_STEP rows and more: results are the same bit for bit. With `blocks`, products are those of the file.

    No sequence has more than `longest` tokens, so that a window of as many hides nothing. With `release` the model's
    own weights go layer by layer, so that they never all lie beside their copies; it cannot run any more.
    """

    def __init__(
        self,
        model: Any,
        kv_cache: KVCache,
        weights: WeightFormat | None = None,
        release: bool = False,
        longest: int | None = None,
        blocks: GgufWeights | None = None,
    ) -> None:
        self._embed = model.get_input_embeddings()
        if blocks is not None:
            weights = WeightFormat.GGUF_BLOCKS
        self.weights = weights or plain_weights(kv_cache.dtype)
        also = weights is None and self.weights is WeightFormat.BFLOAT16_IN_12_BITS and _has_room_for_a_copy(model)
        self.weights_of_long_steps = _AS_IT_IS[kv_cache.dtype] if also else self.weights
        formats = dict.fromkeys((self.weights, self.weights_of_long_steps))
        decoders = {each: _make_decoder(model, kv_cache, each) for each in formats}
        family, parts = Family.of(model.config), FAMILIES[type(model).__name__]
        self._length_rule = family.length_rule
        windows = family.windows if longest is None else family.windows_within(longest)
        layers = zip(model.model.layers, kv_cache.keys, kv_cache.values, windows, rotary_of_layers(model), strict=True)
        for index, (layer, keys, values, window, rotary) in enumerate(layers):
            for decoder in decoders.values():
                weights_of_layer = layer_weights(layer, parts)
                own = {} if blocks is None else layer_blocks(layer, blocks)
                weights_of_layer |= {name: each.data for name, each in own.items()}
                if kv_cache.key_offsets is not None:
                    weights_of_layer["key_offset"] = kv_cache.key_offsets.offsets[index]
                kinds = {name: each.kind.value for name, each in own.items()}
                decoder.add_layer(weights_of_layer, kinds, keys, values, window or 0, rotary)
            if release:
                release_linears(layer)
        for decoder in decoders.values():
            head, norm = model.lm_head, norm_of(parts, model.model.norm)
            if blocks is None:
                decoder.set_head(norm, head.weight, None, head.bias)
            else:
                decoder.set_head(norm, blocks.of(head).data, blocks.of(head).kind.value, head.bias)
        self.weight_bytes = sum(decoder.weight_bytes() for decoder in decoders.values())
        self._decoder, self._decoder_of_long_steps = decoders[self.weights], decoders[self.weights_of_long_steps]

    def limit_windows(self, most: int | None) -> None:
        """Until the next call no window is longer; None: they are as the model has them."""
        for decoder in {self._decoder, self._decoder_of_long_steps}:
            decoder.limit_windows(most or 0)

    def __call__(self, batch: RaggedBatch) -> torch.Tensor:
        return self._run(batch, as_states=False)

    def hidden_states(self, batch: RaggedBatch) -> torch.Tensor:
        return self._run(batch, as_states=True)

    def _run(self, batch: RaggedBatch, *, as_states: bool) -> torch.Tensor:
        inputs = self._embed(batch.token_ids)
        for first, embeddings in batch.embeddings:
            inputs[first : first + embeddings.shape[0]] = embeddings
        attention, rule = batch.attention, self._length_rule
        if rule is not None and batch.lengths is None:
            raise ValueError("the batch has no lengths for positions that turn by them")
        decoder = self._decoder if inputs.shape[0] < LONG_STEP else self._decoder_of_long_steps
        out: torch.Tensor = decoder.forward(
            inputs,
            batch.positions,
            attention.query_start,
            attention.context_len,
            attention.block_table,
            attention.slot_mapping,
            batch.logit_rows,
            as_states,
            attention.decodes,
            attention.joins_ranges,
            None if rule is None or batch.lengths is None else batch.lengths > rule.original,
        )
        return out
