"""The plan of a step: every key of every query row in exactly one tile, and enough tiles to fill the GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from softbatch.scheduler.model.attention.tiles import Planner, make_planner


def planner(heads: int = 32, kv_heads: int = 8, dtype: torch.dtype = torch.bfloat16) -> Planner:
    return make_planner(
        heads=heads, kv_heads=kv_heads, head_dim=128, dtype=dtype, multiprocessors=132, shared_memory=232_448
    )


@settings(derandomize=True, deadline=None, max_examples=200)
@given(
    rows=st.lists(st.tuples(st.integers(0, 300), st.integers(0, 3000)), min_size=1, max_size=12),
    decoding=st.booleans(),
    heads=st.sampled_from([(32, 8), (9, 3), (8, 8), (32, 1)]),
)
def test_tiles_cover_what_each_row_sees_exactly_once(
    rows: list[tuple[int, int]], decoding: bool, heads: tuple[int, int]
) -> None:
    counts = np.array([1 if decoding else count for count, _ in rows])
    contexts = np.maximum(1, counts + np.array([before for _, before in rows]))
    this = planner(*heads)
    plan = this.plan(counts, contexts)
    seen = [np.zeros((q, c), dtype=int) for q, c in zip(counts, contexts, strict=True)]
    for sequence, first, start, end in plan.narrow:
        assert first == 0
        assert counts[sequence] * this.group <= this.narrow.block_m
        seen[sequence][:, start:end] += 1
    step = this.wide.block_m // this.group
    for sequence, first, start, end in plan.wide:
        assert start == 0
        seen[sequence][first : first + step, :end] += 1
    for q, c, grid in zip(counts, contexts, seen, strict=True):
        for row in range(q):
            assert (grid[row, : c - q + row + 1] == 1).all()
    assert (np.diff(plan.wide[:, 3]) <= 0).all()
    assert len(plan.wide) <= this.max_wide_tiles(counts.sum())
    if decoding:
        assert len(plan.narrow) <= this.max_narrow_tiles(len(counts))
    starts = np.cumsum(counts) - counts
    for out, first, parts, local in plan.merges:
        sequence = plan.narrow[first, 0]
        assert (plan.narrow[first : first + parts, 0] == sequence).all()
        assert (plan.narrow[:, 0] == sequence).sum() == parts
        assert out == starts[sequence] + local
    narrow_rows = [r for s in set(plan.narrow[:, 0]) for r in range(starts[s], starts[s] + counts[s])]
    assert sorted(plan.merges[:, 0]) == sorted(narrow_rows)


@pytest.mark.parametrize(("batch", "context"), [(1, 2048), (1, 100_000), (8, 4096), (64, 2048)])
def test_decoding_keeps_all_multiprocessors_busy(batch: int, context: int) -> None:
    plan = planner().plan(np.ones(batch), np.full(batch, context))
    assert len(plan.narrow) * 8 >= 132
    assert len(plan.narrow) * 8 <= 2 * 4 * 132 + batch * 8


def test_shapes_fit_the_shared_memory_there_is() -> None:
    small = make_planner(
        heads=32, kv_heads=8, head_dim=128, dtype=torch.bfloat16, multiprocessors=40, shared_memory=64 << 10
    )
    large = planner()
    assert small.wide.num_stages < large.wide.num_stages
    assert small.wide.block_m < large.wide.block_m
