"""Paged attention on CPUs, in C++."""

from __future__ import annotations

import torch

from scheduler.model.attention.base import AttentionBackend, PagedBatch
from scheduler.model.cpu.build import build as build_kernels

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def build() -> AttentionBackend | None:
    """The kernel; None, after one warning, where it cannot be built."""
    return paged_attention if build_kernels() else None


def paged_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    batch: PagedBatch,
    scale: float,
) -> torch.Tensor:
    """`AttentionBackend` in C++ for the dtypes in `DTYPES`. Raises RuntimeError for tensors that do not fit."""
    out: torch.Tensor = torch.ops.softbatch.paged_attention(
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
    )
    return out
