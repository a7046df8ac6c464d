"""The C++ operators and classes by name and type: no other file names `torch.ops.softbatch` or its classes.

`build` in build.py must have succeeded before anything but `are_loaded` is called.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from softbatch.scheduler.model.cpu.formats import BlockKind, KvFormat, WeightFormat


def are_loaded() -> bool:
    return hasattr(torch.ops.softbatch, "paged_attention")


def has_12_bits() -> bool:
    """Whether the kernels built for this machine can keep bfloat16 weights in 12 bits."""
    return bool(torch.ops.softbatch.has_12_bits())


def operator(name: str) -> Any:
    """An operator as torch's own checks take it."""
    return getattr(torch.ops.softbatch, name).default


def weight_formats() -> dict[str, int]:
    """Every format of weights that C++ knows, by name."""
    return dict(torch.ops.softbatch.weight_formats())


def kv_formats() -> dict[str, int]:
    """The same of KV caches."""
    return dict(torch.ops.softbatch.kv_formats())


def block_kinds() -> dict[str, int]:
    """Every kind of GGUF's blocks that C++ knows, by name."""
    return dict(torch.ops.softbatch.block_kinds())


def dequantize_blocks(data: Tensor, kind: BlockKind) -> Tensor:
    """uint8 [rows, bytes of a row] as float32 [rows, inputs]. Raises RuntimeError for other bytes."""
    numbers: Tensor = torch.ops.softbatch.dequantize_blocks(data, kind.value)
    return numbers


def multiply_blocks(x: Tensor, matrices: Sequence[tuple[Tensor, BlockKind]]) -> Tensor:
    """float32 [rows, inputs] times each matrix of blocks, whose outputs lie one behind another."""
    data, kinds = [data for data, _ in matrices], [kind.value for _, kind in matrices]
    products: Tensor = torch.ops.softbatch.multiply_blocks(x, data, kinds)
    return products


def packed_row_bytes(kv_format: KvFormat, head_dim: int) -> tuple[int, int]:
    """Bytes of a packed key and of a packed value. Raises RuntimeError for heads that cannot be packed."""
    key, value = torch.ops.softbatch.packed_row_bytes(kv_format.value, head_dim)
    return key, value


def pack_rows(numbers: Tensor, kv_format: KvFormat, are_keys: bool) -> Tensor:
    """float32 […, head_dim] as uint8 […, bytes]."""
    packed: Tensor = torch.ops.softbatch.pack_rows(numbers, kv_format.value, are_keys)
    return packed


def paged_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    query_start: Tensor,
    context_len: Tensor,
    block_table: Tensor,
    slot_mapping: Tensor,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    decodes: Tensor | None = None,
    joins_ranges: bool = True,
) -> Tensor:
    """A window or a softcap of 0 is none. Raises RuntimeError for tensors that do not fit."""
    out: Tensor = torch.ops.softbatch.paged_attention(
        query,
        key,
        value,
        key_cache,
        value_cache,
        query_start,
        context_len,
        block_table,
        slot_mapping,
        scale,
        window,
        softcap,
        sinks,
        decodes,
        joins_ranges,
    )
    return out


def prefix_attention(inputs: Sequence[Tensor], scale: float) -> tuple[Tensor, Tensor]:
    """Attention of query, key and value behind a prefix's keys and values; also the weights that backward needs."""
    out, weights = torch.ops.softbatch.prefix_attention(*inputs, scale)
    return out, weights


def prefix_attention_backward(inputs: Sequence[Tensor], scale: float, weights: Tensor, grad: Tensor) -> list[Tensor]:
    """Gradients in the five inputs of `prefix_attention`."""
    return list(torch.ops.softbatch.prefix_attention_backward(*inputs, scale, weights, grad))


def make_decoder(
    weights: WeightFormat,
    dtype: torch.dtype,
    shape: dict[str, float],
    frequencies: Tensor,
    rotary_scales: Tensor,
    *,
    kv_format: KvFormat,
    long_frequencies: Tensor | None = None,
) -> Any:
    """The C++ class Decoder: all layers of a served model, which attends in `dtype`. `shape` has the numbers that
    csrc/llama/decoder_shape.h names, the tensors what each rotary scheme has, in long sequences too if they turn
    otherwise."""
    return torch.classes.softbatch.Decoder(
        weights.value,
        dtype,
        shape,
        frequencies.float(),
        rotary_scales,
        None if long_frequencies is None else long_frequencies.float(),
        kv_format.value,
    )


def make_layers(weights: WeightFormat, num_heads: int, num_kv_heads: int, head_dim: int, epsilon: float) -> Any:
    """The C++ class Layers: those of a frozen model, with gradients."""
    return torch.classes.softbatch.Layers(weights.value, num_heads, num_kv_heads, head_dim, epsilon)


def make_objective(weights: WeightFormat, head: Tensor, bias: Tensor | None) -> Any:
    """The C++ class Objective: the loss behind a frozen model's head."""
    return torch.classes.softbatch.Objective(weights.value, head, bias)
