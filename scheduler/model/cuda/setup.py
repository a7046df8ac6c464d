"""How a model is set up on a GPU: fused kernels if they fit, CUDA graphs, and the size of the KV cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from softbatch.prompt_store.manifest import ModelSpec
from softbatch.scheduler.model.attention.backend import AttentionBackend
from softbatch.scheduler.model.attention.tiles import Planner
from softbatch.scheduler.model.attention.triton import TritonAttention
from softbatch.scheduler.model.batch import BatchBuilder, Row, build_batch
from softbatch.scheduler.model.cuda import fused
from softbatch.scheduler.model.cuda.buckets import BucketedBatches, decoding_sizes, mixed_sizes
from softbatch.scheduler.model.cuda.device_memory import DeviceMemory, memory_of, peak_of
from softbatch.scheduler.model.cuda.graphs import Capturer, GraphForward
from softbatch.scheduler.model.family import Family
from softbatch.scheduler.model.forward import Forward, TransformersForward
from softbatch.scheduler.model.kv_cache import KVCache
from softbatch.scheduler.model.sampling.adjustments import SampleInput
from softbatch.scheduler.model.sampling.sampler import Samples, sample
from softbatch.scheduler.protocol import EngineConfig, SamplingParams


def make_forward(model: Any, kv_cache: KVCache, backend: AttentionBackend, longest: int | None = None) -> Forward:
    """The fastest forward pass for this model without graphs."""
    family = Family.of(model.config)
    windows = family.windows if longest is None else family.windows_within(longest)
    if isinstance(backend, TritonAttention) and fused.supports(model) and not any(windows):
        return fused.FusedForward(model, kv_cache, backend)
    return TransformersForward(model, kv_cache, backend, longest)


def with_graphs(
    forward: Forward,
    kv_cache: KVCache,
    planner: Planner | None,
    *,
    max_batch_size: int,
    max_batch_tokens: int,
    max_model_len: int,
    capturer: Capturer,
    by_length: bool = False,
) -> tuple[GraphForward, BatchBuilder]:
    """The forward pass with graphs, not captured yet, and the builder of padded batches for them."""
    batches = BucketedBatches(
        decoding=decoding_sizes(max_batch_size),
        mixed=mixed_sizes(max_batch_tokens),
        max_logits=max_batch_size,
        scratch_block=kv_cache.num_blocks,
        block_size=kv_cache.block_size,
        device=kv_cache.device,
        planner=planner,
        by_length=by_length,
    )
    # One block more than the longest sequence fills, because its last token may be the first of a block.
    max_blocks = -(-max_model_len // kv_cache.block_size) + 1
    return GraphForward(forward, batches, max_blocks, capturer), batches


def make_planner(model: Any, backend: AttentionBackend, spec: ModelSpec) -> Planner | None:
    if not isinstance(backend, TritonAttention):
        return None
    heads = Family.of(model.config).num_heads
    return backend.planner(heads=heads, kv_heads=spec.num_kv_heads, head_dim=spec.head_dim, dtype=model.dtype)


def measure_memory(
    model: Any, backend: AttentionBackend, spec: ModelSpec, config: EngineConfig, max_model_len: int
) -> DeviceMemory:
    """Raises torch.OutOfMemoryError."""
    device: torch.device = model.device
    peak = peak_of(largest_step(model, backend, spec, config, max_model_len), device)
    return memory_of(device, peak)


def largest_step(
    model: Any, backend: AttentionBackend, spec: ModelSpec, config: EngineConfig, max_model_len: int
) -> Callable[[], None]:
    """Two steps that fill the token budget and sample for every slot, over a cache of their own. As in the engine, the
    first step's samples are read after the second is launched."""
    device: torch.device = model.device
    length = min(max_model_len, config.max_batch_tokens)
    blocks = list(range(-(-length // config.block_size)))
    kv_cache = KVCache(
        num_layers=spec.num_layers,
        num_blocks=len(blocks),
        num_kv_heads=spec.num_kv_heads,
        block_size=config.block_size,
        head_dim=spec.head_dim,
        dtype=model.dtype,
        device=device,
    )
    forward = make_forward(model, kv_cache, backend, max_model_len)
    planner = make_planner(model, backend, spec)
    by_length = Family.of(model.config).length_rule is not None
    rows, left = [], config.max_batch_tokens
    while left > 0:  # all in the same blocks, because the result does not matter
        count = min(left, length)
        rows.append(Row(0, [0] * count, blocks, range(count - 1, count)))
        left -= count
    more = max(0, config.max_batch_size - len(rows))
    first = rows[0].count
    rows[0] = Row(0, rows[0].token_ids, blocks, range(max(0, first - 1 - more), first))
    params = SamplingParams(temperature=1.0, top_p=0.9, logprobs=1, repetition_penalty=1.1)

    def launched() -> Samples:
        logits = forward(build_batch(rows, config.block_size, device, planner, by_length=by_length))
        return sample(logits.nan_to_num(), [SampleInput(params, [0], 1, index) for index in range(len(logits))])

    @torch.inference_mode()
    def run() -> None:
        for samples in (launched(), launched()):
            samples.read()

    return run
