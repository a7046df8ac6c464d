"""The GPU's attention backend: launches the Triton kernels over a step's plan."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from softbatch.scheduler.model.attention.backend import CAUSAL, AttentionKind, PagedBatch
from softbatch.scheduler.model.attention.tiles import (
    MIN_DOT,
    AttentionPlan,
    Planner,
    TileShape,
    make_planner,
    next_power_of_two,
)

logger = logging.getLogger(__name__)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# For the interpreter, which has no multiprocessors: it runs one program after another.
_INTERPRETED = (4, 1 << 16)
_MERGE_PARTS = 16  # parts that one program reads at once


def build(device: torch.device, log: logging.Logger = logger) -> TritonAttention | None:
    """The backend for this device; None, after one warning, if Triton is missing."""
    try:
        from softbatch.scheduler.model.attention import triton_kernels
    except ImportError as error:
        log.warning("no Triton here (%s): attention runs in plain torch, several times slower", error)
        return None
    return TritonAttention(triton_kernels, *_limits(device))


class TritonAttention:
    """`AttentionBackend` in Triton, for the dtypes in `DTYPES`.

    For a batch that carries a plan, the host does not wait for the device. For a batch without, the plan is made here.
    """

    def __init__(self, kernels: Any, multiprocessors: int, shared_memory: int) -> None:
        self._kernels = kernels
        self._multiprocessors = multiprocessors
        self._shared_memory = shared_memory

    def planner(self, *, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> Planner:
        return make_planner(
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            dtype=dtype,
            multiprocessors=self._multiprocessors,
            shared_memory=self._shared_memory,
        )

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        batch: PagedBatch,
        scale: float,
        kind: AttentionKind = CAUSAL,
    ) -> torch.Tensor:
        self.write(key, value, key_cache, value_cache, batch.slot_mapping)
        return self.attend(query, key_cache, value_cache, batch, scale, kind)

    def write(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Write the new tokens' keys and values [T, kv_heads, head_dim] to their slots."""
        key, value = _rows_contiguous(key), _rows_contiguous(value)
        _check_cache(key_cache, value_cache)
        tokens, kv_heads, head_dim = key.shape
        if tokens == 0:
            return
        self._kernels.write_cache[(tokens,)](
            key,
            value,
            key_cache,
            value_cache,
            slot_mapping,
            key.stride(0),
            key.stride(1),
            value.stride(0),
            value.stride(1),
            key_cache.stride(0),
            key_cache.stride(1),
            KV_HEADS=kv_heads,
            HEAD_DIM=head_dim,
            BLOCK_SIZE=key_cache.shape[2],
            BLOCK_H=next_power_of_two(kv_heads),
            BLOCK_D=next_power_of_two(head_dim),
            num_warps=1 if kv_heads * head_dim <= 512 else 4,
        )

    def attend(
        self,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        batch: PagedBatch,
        scale: float,
        kind: AttentionKind = CAUSAL,
    ) -> torch.Tensor:
        """Attention over the keys and values in the cache, this step's included."""
        query = _rows_contiguous(query)
        _check_cache(key_cache, value_cache)
        tokens, heads, head_dim = query.shape
        kv_heads = key_cache.shape[1]
        _check_query(query, key_cache)
        out = torch.empty((tokens, heads, head_dim), dtype=query.dtype, device=query.device)
        planner = self.planner(heads=heads, kv_heads=kv_heads, head_dim=head_dim, dtype=query.dtype)
        plan = batch.plan if batch.plan is not None else plan_of(batch, planner)

        def launch(tiles: torch.Tensor, shape: TileShape, parts: tuple[torch.Tensor, ...], *, split: bool) -> None:
            self._kernels.attend[(tiles.shape[0], kv_heads)](
                query,
                out,
                key_cache,
                value_cache,
                batch.block_table,
                batch.query_start,
                batch.context_len,
                tiles,
                *parts,
                out if kind.sinks is None else kind.sinks,
                scale * math.log2(math.e),
                query.stride(0),
                query.stride(1),
                batch.block_table.stride(0),
                key_cache.stride(0),
                key_cache.stride(1),
                KV_HEADS=kv_heads,
                GROUP=heads // kv_heads,
                HEAD_DIM=head_dim,
                BLOCK_SIZE=key_cache.shape[2],
                BLOCK_M=shape.block_m,
                BLOCK_N=shape.block_n,
                BLOCK_D=max(MIN_DOT, next_power_of_two(head_dim)),
                SPLIT=split,
                **_compile_time(kind),
                num_warps=shape.num_warps,
                num_stages=shape.num_stages,
            )

        if plan.wide.shape[0]:
            launch(plan.wide, planner.wide, (out, out, out), split=False)
        if plan.narrow.shape[0]:
            rows = plan.narrow.shape[0] if plan.has_parts else 0
            parts = _part_buffers(rows, kv_heads, planner.narrow.block_m, head_dim, out.device)
            launch(plan.narrow, planner.narrow, parts, split=True)
            if plan.has_parts:
                self._merge(out, plan.merges, parts, kind.sinks, kv_heads, planner.narrow.block_m)
        return out

    def _merge(
        self,
        out: torch.Tensor,
        merges: torch.Tensor,
        parts: tuple[torch.Tensor, ...],
        sinks: torch.Tensor | None,
        kv_heads: int,
        block_m: int,
    ) -> None:
        """The results of rows whose keys were split, from their parts."""
        _, heads, head_dim = out.shape
        self._kernels.merge[(merges.shape[0], heads)](
            out,
            merges,
            *parts,
            out if sinks is None else sinks,
            KV_HEADS=kv_heads,
            GROUP=heads // kv_heads,
            HEAD_DIM=head_dim,
            BLOCK_M=block_m,
            BLOCK_D=next_power_of_two(head_dim),
            BLOCK_P=_MERGE_PARTS,
            SINKS=sinks is not None,
            num_warps=1 if head_dim <= 128 else 4,
        )


def plan_of(batch: PagedBatch, planner: Planner) -> AttentionPlan:
    """The plan of a batch that carries none. Reads the batch back from the device."""
    starts, contexts = batch.query_start.cpu().numpy(), batch.context_len.cpu().numpy()
    arrays = planner.plan(np.diff(starts), contexts)
    device = batch.query_start.device
    narrow, merges, wide = (torch.from_numpy(a).to(device) for a in (arrays.narrow, arrays.merges, arrays.wide))
    return AttentionPlan(narrow, merges, wide, arrays.has_parts)


def _part_buffers(
    tiles: int, kv_heads: int, rows: int, head_dim: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    make: Callable[..., torch.Tensor] = torch.empty
    return (
        make((tiles, kv_heads, rows, head_dim), dtype=torch.float32, device=device),
        make((tiles, kv_heads, rows), dtype=torch.float32, device=device),
        make((tiles, kv_heads, rows), dtype=torch.float32, device=device),
    )


def _rows_contiguous(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _compile_time(kind: AttentionKind) -> dict[str, Any]:
    softcap = (kind.softcap or 0.0) * math.log2(math.e)
    return {"WINDOW": kind.window or 0, "SOFTCAP": softcap, "SINKS": kind.sinks is not None}


def _check_query(query: torch.Tensor, key_cache: torch.Tensor) -> None:
    _, heads, head_dim = query.shape
    if heads % key_cache.shape[1] or head_dim != key_cache.shape[3] or query.dtype != key_cache.dtype:
        raise RuntimeError(f"a query of {tuple(query.shape)} does not fit a cache of {tuple(key_cache.shape)}")


def _check_cache(key_cache: torch.Tensor, value_cache: torch.Tensor) -> None:
    head_dim = key_cache.shape[3]
    if key_cache.shape != value_cache.shape or key_cache.stride() != value_cache.stride():
        raise RuntimeError("key_cache and value_cache must have one shape and layout")
    if key_cache.stride(3) != 1 or key_cache.stride(2) != head_dim:
        raise RuntimeError("the slots of a block must lie one after another")


def _limits(device: torch.device) -> tuple[int, int]:
    """The number of multiprocessors, and the bytes of shared memory that a program may use."""
    if device.type != "cuda":
        return _INTERPRETED
    properties = torch.cuda.get_device_properties(device)
    most = getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)
    return properties.multi_processor_count, int(most)
