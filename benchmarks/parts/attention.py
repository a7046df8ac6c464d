"""Times one attention layer of every backend, beside torch's own attention: `python -m benchmarks.parts.attention`.

Torch's own attention gets its keys and values gathered and padded beforehand, free of charge; the backends write
the new tokens and read through block tables, as they do in a step.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.nn.functional import scaled_dot_product_attention

from softbatch.scheduler.model.attention import cpu
from softbatch.scheduler.model.attention.backend import AttentionBackend, PagedBatch
from softbatch.scheduler.model.attention.reference import reference

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Workload:
    """`batch` sequences with `query` new tokens each, at `context` tokens with those."""

    name: str
    batch: int
    query: int
    context: int


WORKLOADS = [
    *(Workload("decode", batch, 1, context) for batch in (1, 8, 32) for context in (64, 288, 2048)),
    *(Workload("prefill", 1, 512, context) for context in (512, 2048)),
]


@dataclass(frozen=True)
class Layer:
    """One layer's tensors for a workload; a model has several, so that none stays in the processor's cache."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    key_cache: torch.Tensor
    value_cache: torch.Tensor
    keys: torch.Tensor  # [batch, kv_heads, context, head_dim], what torch's own attention takes
    values: torch.Tensor


def make_layer(work: Workload, options: argparse.Namespace, blocks: torch.Tensor) -> Layer:
    dtype, kv_heads, head_dim = DTYPES[options.dtype], options.kv_heads, options.head_dim
    tokens = work.batch * work.query
    cache = (int(blocks.max()) + 1, kv_heads, options.block_size, head_dim)
    key_cache, value_cache = torch.randn(cache).to(dtype), torch.randn(cache).to(dtype)
    gathered = [
        c[blocks.long()].transpose(1, 2).flatten(2, 3)[:, :, : work.context].contiguous()
        for c in (key_cache, value_cache)
    ]
    query = torch.randn(tokens, options.heads, head_dim).to(dtype)
    key, value = (torch.randn(tokens, kv_heads, head_dim).to(dtype) for _ in range(2))
    return Layer(query, key, value, key_cache, value_cache, *gathered)


def make_batch(work: Workload, block_size: int) -> PagedBatch:
    per_sequence = -(-work.context // block_size)
    table = torch.randperm(work.batch * per_sequence).view(work.batch, -1).int()
    position = torch.arange(work.context - work.query, work.context)
    slots = table[:, position // block_size].long() * block_size + position % block_size
    return PagedBatch(
        query_start=torch.arange(work.batch + 1, dtype=torch.int32) * work.query,
        context_len=torch.full((work.batch,), work.context, dtype=torch.int32),
        block_table=table,
        slot_mapping=slots.flatten(),
    )


def sdpa(layer: Layer, batch: PagedBatch, scale: float) -> torch.Tensor:
    sequences, _, context, head_dim = layer.keys.shape
    query = layer.query.view(sequences, -1, layer.query.shape[1], head_dim).transpose(1, 2)
    length = query.shape[2]
    mask = None if length == 1 else torch.ones(length, context, dtype=torch.bool).tril(context - length)
    out = scaled_dot_product_attention(query, layer.keys, layer.values, attn_mask=mask, scale=scale, enable_gqa=True)
    return out.transpose(1, 2)


def milliseconds(step: Callable[[Layer], object], layers: list[Layer], seconds: float) -> float:
    """Mean time of one layer in the best of the rounds through all layers that fit into `seconds`, at least three."""
    rounds: list[float] = []
    deadline = time.perf_counter() + seconds
    while len(rounds) < 3 or time.perf_counter() < deadline:
        started = time.perf_counter()
        for layer in layers:
            step(layer)
        rounds.append(time.perf_counter() - started)
    return min(rounds) / len(layers) * 1e3


def measure(work: Workload, backends: dict[str, AttentionBackend], options: argparse.Namespace) -> dict[str, float]:
    batch = make_batch(work, options.block_size)
    layers = [make_layer(work, options, batch.block_table) for _ in range(options.layers)]
    scale = options.head_dim**-0.5

    def paged(backend: AttentionBackend) -> Callable[[Layer], torch.Tensor]:
        return lambda layer: backend(
            layer.query, layer.key, layer.value, layer.key_cache, layer.value_cache, batch, scale
        )

    steps: dict[str, Callable[[Layer], torch.Tensor]] = {
        **{name: paged(backend) for name, backend in backends.items()},
        "sdpa": lambda layer: sdpa(layer, batch, scale),
    }
    return {name: milliseconds(step, layers, options.seconds) for name, step in steps.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--heads", type=int, default=9)
    parser.add_argument("--kv-heads", type=int, default=3)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--layers", type=int, default=8, help="layers to cycle through, each with its own cache")
    parser.add_argument("--seconds", type=float, default=0.5, help="time for each cell")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results there")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)

    kernel = cpu.build()
    backends: dict[str, AttentionBackend] = {"cpu": kernel} if kernel is not None else {}
    backends["reference"] = reference
    print(
        f"ms per layer: {options.heads} heads, {options.kv_heads} kv heads of {options.head_dim}, {options.dtype}, "
        f"blocks of {options.block_size}, {options.threads} thread(s), torch {torch.__version__}"
    )
    results = []
    with torch.inference_mode():
        for index, work in enumerate(WORKLOADS):
            times = measure(work, backends, options)
            if index == 0:
                print(f"{'':8}{'batch':>6}{'query':>6}{'context':>8}", *(f"{name:>10}" for name in times))
            print(
                f"{work.name:8}{work.batch:6}{work.query:6}{work.context:8}",
                *(f"{time:10.3f}" for time in times.values()),
                flush=True,
            )
            results.append({**asdict(work), "milliseconds": times})
    if options.json:
        settings = {name: value for name, value in vars(options).items() if name != "json"}
        report = {"torch": torch.__version__, "settings": settings, "results": results}
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
