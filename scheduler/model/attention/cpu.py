"""Paged attention on CPUs, in C++."""

from __future__ import annotations

import torch

from softbatch.scheduler.model.attention.backend import CAUSAL, AttentionBackend, AttentionKind, PagedBatch
from softbatch.scheduler.model.cpu import ops
from softbatch.scheduler.model.cpu.build import build as build_kernels

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def build() -> AttentionBackend | None:
    """The kernel; None, after one warning, if it cannot be built."""
    return paged_attention if build_kernels() else None


def paged_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    batch: PagedBatch,
    scale: float,
    kind: AttentionKind = CAUSAL,
) -> torch.Tensor:
    """`AttentionBackend` in C++ for the dtypes in `DTYPES`. Raises RuntimeError for tensors that do not fit."""
    return ops.paged_attention(
        query,
        key,
        value,
        key_cache,
        value_cache,
        batch.query_start,
        batch.context_len,
        batch.block_table,
        batch.slot_mapping,
        scale,
        kind.window or 0,
        kind.softcap or 0.0,
        kind.sinks,
        batch.decodes,
        batch.joins_ranges,
    )


def behind_prefix(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
) -> torch.Tensor:
    """Causal attention of rows over a prefix that all of them share and over their own tokens. Without gradients.

    `query` [batch, heads, tokens, head_dim]; `key`, `value` [batch, kv_heads, tokens, head_dim]; `keys`, `values`
    [kv_heads, n, head_dim] of the prefix; returns the query's shape. `build` must have succeeded.
    """
    count, heads, tokens, dim = query.shape
    length = keys.shape[1]
    own = torch.arange(length, length + count * tokens)
    shared = torch.arange(length, dtype=torch.int32).expand(count, length)
    batch = PagedBatch(  # of blocks of one token each: the prefix ends anywhere
        query_start=torch.arange(0, (count + 1) * tokens, tokens, dtype=torch.int32),
        context_len=torch.full((count,), length + tokens, dtype=torch.int32),
        block_table=torch.cat((shared, own.int().view(count, tokens)), dim=1),
        slot_mapping=own,
    )

    def in_order(rows: torch.Tensor) -> torch.Tensor:
        return rows.transpose(1, 2).reshape(count * tokens, -1, dim)

    def cache(prefix: torch.Tensor) -> torch.Tensor:
        blocks = prefix.new_empty(length + count * tokens, prefix.shape[0], 1, dim)
        blocks[:length, :, 0] = prefix.transpose(0, 1)
        return blocks

    out = paged_attention(in_order(query), in_order(key), in_order(value), cache(keys), cache(values), batch, scale)
    return out.view(count, tokens, heads, dim).transpose(1, 2)
