"""The KV cache that a configuration asks for: how its rows are stored, how many blocks it has, if that is enough."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import psutil
import torch

from softbatch.prompt_store.manifest import ModelSpec
from softbatch.scheduler.model.attention.backend import AttentionBackend
from softbatch.scheduler.model.cpu.build import build as build_kernels
from softbatch.scheduler.model.cpu.formats import KvFormat
from softbatch.scheduler.model.cuda.device_memory import DeviceMemory, is_shortage
from softbatch.scheduler.model.cuda.setup import measure_memory
from softbatch.scheduler.model.kv_cache import KVCache, RowFormat
from softbatch.scheduler.model.llama.decoder import supports, unsupported_option_error
from softbatch.scheduler.model.llama.description import key_offsets_of
from softbatch.scheduler.model.source import ModelError
from softbatch.scheduler.protocol import EngineConfig

CPU_KV_CACHE_GIB = 1.0


def make_cache(
    config: EngineConfig,
    model: Any,
    dtype: torch.dtype,
    backend: AttentionBackend,
    spec: ModelSpec,
    max_model_len: int,
) -> tuple[KVCache, int]:
    """The cache, and the longest sequence: `max_model_len`, or what the cache holds. Raises ModelError."""
    device: torch.device = model.device
    rows = _row_format(config, model, dtype, spec.head_dim)
    bytes_per_token = spec.num_layers * spec.num_kv_heads * rows.bytes_per_token
    cache_bytes, named, advice = _cache_bytes(
        config, device, lambda: measure_memory(model, backend, spec, config, max_model_len)
    )
    num_blocks = cache_bytes // (bytes_per_token * config.block_size)
    # One block beyond the longest sequence: a soft prompt's partly filled last block lies beside its copy.
    holds = (num_blocks - 1) * config.block_size
    if holds < min(max_model_len, 2 * config.block_size if config.max_model_len is None else max_model_len):
        needed = (max_model_len + 2 * config.block_size) * bytes_per_token / 2**30
        raise ModelError(
            f"{named} holds {max(holds, 0)} tokens, fewer than one sequence of {max_model_len}: "
            f"give at least {needed:.2g}, {advice}"
        )
    free = _free_bytes(device)
    if num_blocks * config.block_size * bytes_per_token > free:
        raise ModelError(f"{named}: only {free / 2**30:.1f} GiB of memory are free after the weights")
    try:
        kv_cache = KVCache(
            num_layers=spec.num_layers,
            num_blocks=num_blocks,
            num_kv_heads=spec.num_kv_heads,
            block_size=config.block_size,
            head_dim=spec.head_dim,
            dtype=rows.dtype,
            device=device,
            scratch_block=device.type == "cuda",
            kv_format=rows.kv_format,
            key_offsets=None if rows.kv_format is KvFormat.PLAIN else key_offsets_of(model),
        )
    except RuntimeError as error:
        raise ModelError(f"{named}: not that much memory is free") from error
    return kv_cache, min(max_model_len, holds)


def _row_format(config: EngineConfig, model: Any, dtype: torch.dtype, head_dim: int) -> RowFormat:
    """Raises ModelError where only a plain cache can be read."""
    if config.kv_cache_dtype == "auto":
        return RowFormat(dtype, head_dim)
    named, instead = f"--kv-cache-dtype {config.kv_cache_dtype}", "--kv-cache-dtype auto"
    if not (supports(model, dtype) and build_kernels()):
        raise unsupported_option_error(named, model, instead)
    try:
        rows = RowFormat(dtype, head_dim, KvFormat.named(config.kv_cache_dtype))
        _ = rows.sizes
    except (RuntimeError, ValueError) as error:
        raise ModelError(f"{named}: {str(error).splitlines()[0]}; use {instead}") from error
    return rows


def _cache_bytes(
    config: EngineConfig, device: torch.device, measure: Callable[[], DeviceMemory]
) -> tuple[int, str, str]:
    """The KV cache's size, what names it in messages, and what else to do where it is too small. Raises ModelError."""
    if config.kv_cache_gib is not None or device.type != "cuda":
        gib = CPU_KV_CACHE_GIB if config.kv_cache_gib is None else config.kv_cache_gib
        return int(gib * 2**30), f"--kv-cache-gib {gib:g}", "or a smaller --max-model-len"
    try:
        memory = measure()
    except RuntimeError as error:
        if not is_shortage(error):
            raise
        raise ModelError(
            f"a step of --max-batch-tokens {config.max_batch_tokens} does not fit the GPU beside the weights: "
            "lower it, or free memory"
        ) from error
    named = memory.describe(config.gpu_memory_utilization)
    advice = "or a smaller --max-model-len; lower --max-batch-tokens, raise the share, or free memory"
    return max(0, memory.left_for_cache(config.gpu_memory_utilization)), named, advice


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)
