"""Steps for attention backends, with torch's own attention in float64 to compare with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch

from softbatch.scheduler.model.attention.backend import CAUSAL, AttentionBackend, AttentionKind, PagedBatch

NAN = float("nan")


@dataclass(frozen=True)
class Case:
    """One step as the backends get it, and each sequence's whole keys and values [context, kv_heads, head_dim]."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    key_cache: torch.Tensor
    value_cache: torch.Tensor
    batch: PagedBatch
    scale: float
    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    kind: AttentionKind = CAUSAL

    def run(self, backend: AttentionBackend) -> torch.Tensor:
        """The output; afterwards the cache must hold the new tokens and be untouched elsewhere."""
        key_cache, value_cache = self.key_cache.clone(), self.value_cache.clone()
        torch.full_like(self.query, NAN)  # freed at once: what an output left unwritten would most likely show
        out = backend(self.query, self.key, self.value, key_cache, value_cache, self.batch, self.scale, self.kind)
        for cache, before, new in (
            (key_cache, self.key_cache, self.key),
            (value_cache, self.value_cache, self.value),
        ):
            expected = before.clone()
            for token, slot in enumerate(self.batch.slot_mapping.tolist()):
                expected[slot // before.shape[2], :, slot % before.shape[2]] = new[token]
            torch.testing.assert_close(cache, expected, rtol=0, atol=0, equal_nan=True)
        return out

    def alone(self, sequence: int) -> Case:
        """The same step for one of its sequences."""
        first, end = self.batch.query_start[sequence : sequence + 2].tolist()
        batch = PagedBatch(
            query_start=torch.tensor([0, end - first], dtype=torch.int32),
            context_len=self.batch.context_len[sequence : sequence + 1],
            block_table=self.batch.block_table[sequence : sequence + 1],
            slot_mapping=self.batch.slot_mapping[first:end],
        )
        query, key, value = (tensor[first:end] for tensor in (self.query, self.key, self.value))
        return replace(self, query=query, key=key, value=value, batch=batch)

    def expected(self, absolute: bool = False) -> torch.Tensor:
        """float64 [T, heads, head_dim], one sequence after another; `absolute`: of the values' size."""
        rows, start, kind = [], self.batch.query_start.tolist(), self.kind
        for s, (keys, values) in enumerate(zip(self.keys, self.values, strict=True)):
            query = self.query[start[s] : start[s + 1]].double().transpose(0, 1)
            (heads, length, _), (context, kv_heads, _) = query.shape, keys.shape
            every_head = heads // kv_heads
            keys, values = (x.double().transpose(0, 1).repeat_interleave(every_head, 0) for x in (keys, values))
            scores = query @ keys.mT * self.scale
            if kind.softcap is not None:
                scores = kind.softcap * (scores / kind.softcap).tanh()
            seen = torch.ones(length, context, dtype=torch.bool).tril(context - length)
            if kind.window is not None:
                seen &= ~seen.tril(context - length - kind.window)
            scores = scores.masked_fill(~seen, float("-inf"))
            if kind.sinks is not None:
                scores = torch.cat((scores, kind.sinks.double().view(-1, 1, 1).expand(heads, length, 1)), dim=-1)
            weights = scores.softmax(-1)[..., :context]
            rows.append((weights @ (values.abs() if absolute else values)).transpose(0, 1))
        return torch.cat(rows)

    def check(self, *backends: AttentionBackend) -> None:
        expected = self.expected()
        for backend in backends:
            self.assert_near(self.run(backend), expected)

    def assert_near(self, out: torch.Tensor, expected: torch.Tensor) -> None:
        """Within one rounding to the output's dtype, plus what float32 sums lose; in bfloat16, where the weights may
        be rounded too, one rounding of each of them."""
        relative = 1e-5 if out.dtype == torch.float32 else 0.505 * torch.finfo(out.dtype).eps
        allowed = 1e-5 + relative * expected.abs()
        if out.dtype == torch.bfloat16:
            allowed += relative * self.expected(absolute=True)
        assert ((out.double() - expected).abs() <= allowed).all()


def make_case(
    lengths: Sequence[tuple[int, int]],
    *,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    shared_blocks: int = 0,
    begins_like: Mapping[int, tuple[int, int]] = MappingProxyType({}),
    seed: int = 0,
) -> Case:
    """Random sequences of (query length, context length); all start with the same `shared_blocks` full blocks, and
    sequence s, where `begins_like[s]` is (an earlier sequence, n), with that one's first n.

    Blocks are scattered, block 0 (which pads the block tables) belongs to nobody, and every cache slot that no
    token owns holds NaN, those that this step's tokens will fill included.
    """
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    common = [begins_like[s][1] if s in begins_like else shared_blocks for s in range(len(lengths))]
    own_blocks = [-(-context // block_size) - n for (_, context), n in zip(lengths, common, strict=True)]
    num_blocks = 1 + shared_blocks + sum(own_blocks) + 2
    free = (torch.randperm(num_blocks - 1, generator=generator) + 1).tolist()
    prefix_table = [free.pop() for _ in range(shared_blocks)]
    prefix_keys, prefix_values = (random(shared_blocks * block_size, kv_heads, head_dim) for _ in range(2))

    key_cache = torch.full((num_blocks, kv_heads, block_size, head_dim), NAN, dtype=dtype)
    value_cache = key_cache.clone()
    table = torch.zeros(len(lengths), max(map(sum, zip(common, own_blocks, strict=True)), default=0), dtype=torch.int32)
    keys, values, new_keys, new_values, slots = [], [], [], [], []
    for s, (length, context) in enumerate(lengths):
        shared = common[s] * block_size
        assert context - length >= shared
        other = begins_like[s][0] if s in begins_like else None
        first_blocks = prefix_table if other is None else table[other, : common[s]].tolist()
        first_keys = prefix_keys if other is None else keys[other][:shared]
        first_values = prefix_values if other is None else values[other][:shared]
        blocks = first_blocks + [free.pop() for _ in range(own_blocks[s])]
        table[s, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
        keys.append(torch.cat([first_keys, random(context - shared, kv_heads, head_dim)]))
        values.append(torch.cat([first_values, random(context - shared, kv_heads, head_dim)]))
        for position in range(context):
            block, offset = blocks[position // block_size], position % block_size
            if position < context - length:
                key_cache[block, :, offset] = keys[s][position]
                value_cache[block, :, offset] = values[s][position]
            else:
                slots.append(block * block_size + offset)
        new_keys.append(keys[s][context - length :])
        new_values.append(values[s][context - length :])
    ends = torch.tensor([0] + [length for length, _ in lengths]).cumsum(0)
    batch = PagedBatch(
        query_start=ends.int(),
        context_len=torch.tensor([context for _, context in lengths], dtype=torch.int32),
        block_table=table,
        slot_mapping=torch.tensor(slots, dtype=torch.int64),
    )
    key, value = (torch.cat([torch.empty(0, kv_heads, head_dim, dtype=dtype), *new]) for new in (new_keys, new_values))
    query = random(int(ends[-1]), heads, head_dim)
    return Case(query, key, value, key_cache, value_cache, batch, head_dim**-0.5, keys, values)


# Decoding, whole and chunked prefill; on both sides of block ends, key tiles (64) and key splits (512, 1024).
RAGGED = [(1, 1), (1, 17), (5, 5), (1, 64), (33, 100), (1, 513), (70, 1090), (2, 2048), (1, 2000), (1, 129), (300, 333)]

# What layers of Gemma 2, Mistral and gpt-oss do otherwise, alone and together.
KINDS = {
    "window": AttentionKind(window=70),
    "own token alone": AttentionKind(window=1),
    "window of splits": AttentionKind(window=1100),
    "softcap": AttentionKind(softcap=1.5),
    "sinks": AttentionKind(sinks=torch.linspace(-3.0, 6.0, 12)),
    "all": AttentionKind(33, 0.7, torch.linspace(2.0, -2.0, 12)),
}


def of_kind(case: Case, name: str) -> Case:
    """The case with one of KINDS."""
    kind = KINDS[name]
    if kind.sinks is None:
        return replace(case, kind=kind)
    return replace(case, kind=replace(kind, sinks=kind.sinks[: case.query.shape[1]]))
