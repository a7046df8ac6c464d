"""The Triton kernels against torch's attention in float64, under Triton's interpreter or on the GPU."""

from __future__ import annotations

import random
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from softbatch.scheduler.model.attention import choose
from softbatch.scheduler.model.attention.backend import PagedBatch
from softbatch.scheduler.model.attention.reference import reference
from softbatch.scheduler.model.attention.tiles import AttentionPlan
from softbatch.scheduler.model.attention.triton import DTYPES, TritonAttention, build, plan_of
from tests.support import triton_device
from tests.support.attention_cases import KINDS, NAN, RAGGED, Case, make_case, of_kind

SHORT = [(1, 1), (1, 17), (5, 5), (33, 100), (1, 130), (0, 9)]


@pytest.fixture(params=triton_device.DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    return triton_device.prepare(request.param)


@pytest.fixture
def kernel(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> TritonAttention:
    """The backend; memory it takes holds NaN, so that what it does not write shows."""
    empty = torch.empty

    def poisoned(*size: Any, **options: Any) -> torch.Tensor:
        tensor = empty(*size, **options)
        return tensor.fill_(NAN) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", poisoned)
    built = build(device)
    assert built is not None
    return built


def on(case: Case, device: torch.device) -> Case:
    """The case with what the backend gets moved to the device."""
    moved = {n: getattr(case, n).to(device) for n in ("query", "key", "value", "key_cache", "value_cache")}
    tensors = {f.name: getattr(case.batch, f.name) for f in fields(case.batch)}
    batch = {n: t.to(device) if isinstance(t, torch.Tensor) else t for n, t in tensors.items()}
    sinks = None if case.kind.sinks is None else case.kind.sinks.to(device)
    return replace(case, batch=PagedBatch(**batch), kind=replace(case.kind, sinks=sinks), **moved)


def check(case: Case, kernel: TritonAttention, device: torch.device) -> torch.Tensor:
    """float32 as near as any summation in float32; else what weights rounded to the dtype cost."""
    out = on(case, device).run(kernel).cpu()
    tolerance = 2e-6 if out.dtype == torch.float32 else torch.finfo(out.dtype).eps
    torch.testing.assert_close(out.double(), case.expected(), rtol=tolerance, atol=2 * tolerance)
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_ragged_batches(kernel: TritonAttention, device: torch.device, head_dim: int, dtype: torch.dtype) -> None:
    lengths = RAGGED if device.type == "cuda" else SHORT
    check(make_case(lengths, heads=8, kv_heads=2, head_dim=head_dim, dtype=dtype, seed=head_dim), kernel, device)


@pytest.mark.parametrize(
    ("group", "kv_heads", "block_size", "head_dim"),
    [(1, 4, 16, 64), (3, 3, 16, 64), (3, 2, 1, 40), (7, 1, 13, 16), (9, 2, 32, 8), (8, 1, 128, 24), (32, 1, 16, 5)],
)
def test_groups_block_sizes_and_head_sizes_that_are_no_powers_of_two(
    kernel: TritonAttention, device: torch.device, group: int, kv_heads: int, block_size: int, head_dim: int
) -> None:
    case = make_case(SHORT, heads=group * kv_heads, kv_heads=kv_heads, head_dim=head_dim, block_size=block_size)
    check(case, kernel, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_long_contexts_are_split_and_merged(kernel: TritonAttention, device: torch.device, dtype: torch.dtype) -> None:
    case = make_case([(1, 8192), (1, 1), (4, 3000), (1, 6011)], heads=4, kv_heads=2, head_dim=64, dtype=dtype)
    planner = kernel.planner(heads=4, kv_heads=2, head_dim=64, dtype=dtype)
    plan = plan_of(on(case, device).batch, planner)
    assert plan.has_parts
    check(case, kernel, device)


@pytest.mark.parametrize(
    ("kind", "dtype"), [*((kind, torch.float32) for kind in KINDS), ("all", torch.bfloat16)], ids=str
)
def test_windows_softcaps_and_sinks(
    kernel: TritonAttention, device: torch.device, kind: str, dtype: torch.dtype
) -> None:
    """Single tokens whose keys are split among programs, some of which see none of them, and chunks."""
    case = make_case([(1, 1), (1, 1200), (5, 5), (33, 100), (4, 500)], heads=3, kv_heads=1, head_dim=16, dtype=dtype)
    check(of_kind(case, kind), kernel, device)


@settings(derandomize=True, deadline=None, max_examples=25)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 40), st.one_of(st.just(0), st.integers(0, 200))), min_size=1, max_size=5),
    group=st.integers(1, 9),
    kv_heads=st.integers(1, 3),
    block_size=st.sampled_from([1, 4, 16, 32]),
    dtype=st.sampled_from(DTYPES),
    shared_blocks=st.integers(0, 3),
    seed=st.integers(0, 1 << 20),
)
@pytest.mark.parametrize("device_name", triton_device.DEVICES)
def test_any_batch(
    device_name: str,
    lengths: list[tuple[int, int]],
    group: int,
    kv_heads: int,
    block_size: int,
    dtype: torch.dtype,
    shared_blocks: int,
    seed: int,
) -> None:
    device = triton_device.prepare(device_name)
    built = build(device)
    assert built is not None
    steps = [(n, max(1, n + before) + shared_blocks * block_size) for n, before in lengths]
    case = make_case(
        steps,
        heads=group * kv_heads,
        kv_heads=kv_heads,
        head_dim=32,
        block_size=block_size,
        dtype=dtype,
        shared_blocks=shared_blocks,
        seed=seed,
    )
    check(case, built, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [16, 64, 96, 128, 256])
def test_sequences_that_share_blocks(
    kernel: TritonAttention, device: torch.device, head_dim: int, dtype: torch.dtype
) -> None:
    """As behind one soft prompt of 64 tokens: decoding, chunks, and one whose own keys fill a block in part."""
    lengths = [(1, 65), (4, 72), (1, 300), (20, 90), (1, 66)]
    case = make_case(lengths, heads=8, kv_heads=2, head_dim=head_dim, shared_blocks=4, dtype=dtype, seed=head_dim)
    check(case, kernel, device)


def test_a_batch_of_nothing(kernel: TritonAttention, device: torch.device) -> None:
    assert on(make_case([]), device).run(kernel).shape == (0, 4, 16)


@pytest.mark.parametrize("layout", ["fused", "transposed", "every other column"])
def test_inputs_need_not_be_contiguous(kernel: TritonAttention, device: torch.device, layout: str) -> None:
    case = on(make_case([(1, 20), (9, 30), (1, 1)], heads=6, kv_heads=2), device)
    tensors = (case.query, case.key, case.value)
    if layout == "fused":
        views = list(torch.cat(tensors, dim=1).split([6, 2, 2], dim=1))
    elif layout == "transposed":
        views = [t.transpose(0, 1).contiguous()[None][0].transpose(0, 1) for t in tensors]
    else:
        views = [torch.stack([t, torch.full_like(t, NAN)], dim=-1)[..., 0] for t in tensors]
    out = replace(case, query=views[0], key=views[1], value=views[2]).run(kernel)
    assert torch.equal(out, case.run(kernel))


def test_layers_may_lie_in_one_tensor_and_tables_in_a_wider_one(kernel: TritonAttention, device: torch.device) -> None:
    case = make_case([(1, 40), (3, 70)])
    moved = on(case, device)
    both = torch.stack([moved.key_cache, moved.value_cache], dim=1)  # strided over the blocks
    wide = torch.full((2, 50), -1, dtype=torch.int32, device=device)
    wide[:, : case.batch.block_table.shape[1]] = moved.batch.block_table
    batch = replace(moved.batch, block_table=wide[:, : case.batch.block_table.shape[1]])
    out = kernel(moved.query, moved.key, moved.value, both[:, 0], both[:, 1], batch, case.scale)
    torch.testing.assert_close(out.cpu().double(), case.expected(), rtol=2e-6, atol=4e-6)


@pytest.mark.parametrize("scale", [0.0, 1e-3, 30.0])
def test_scores_of_any_size(kernel: TritonAttention, device: torch.device, scale: float) -> None:
    """30 · q·k reaches several hundred: exp() without the running maximum would overflow."""
    case = replace(make_case([(1, 600), (50, 120), (1, 5)], head_dim=64), scale=scale)
    out = on(case, device).run(kernel).cpu()
    torch.testing.assert_close(out.double(), case.expected(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("broken", range(4))
def test_nan_stays_in_its_sequence_and_is_not_hidden(
    kernel: TritonAttention, device: torch.device, broken: int
) -> None:
    case = make_case([(1, 90), (20, 90), (1, 700), (3, 3)])
    start = case.batch.query_start.tolist()
    rows = slice(start[broken], start[broken + 1])
    case.query[rows] = NAN
    out = on(case, device).run(kernel).cpu()
    assert out[rows].isnan().all()
    out[rows] = 0
    assert out.isfinite().all()


def test_a_plan_made_with_the_batch_and_padded_gives_the_same(kernel: TritonAttention, device: torch.device) -> None:
    lengths = [(1, 700), (1, 3), (40, 90), (1, 2000)]
    case = make_case(lengths, heads=6, kv_heads=3, head_dim=64)
    planner = kernel.planner(heads=6, kv_heads=3, head_dim=64, dtype=torch.float32)
    arrays = planner.plan(case.batch.query_start.diff().numpy(), case.batch.context_len.numpy())
    nothing = np.full((5, 4), -1, dtype=np.int32)
    narrow, wide = (np.concatenate([tiles, nothing]) for tiles in (arrays.narrow, arrays.wide))
    merges = np.concatenate([arrays.merges, 0 * nothing])
    plan = AttentionPlan(*(torch.from_numpy(a) for a in (narrow, merges, wide)), has_parts=True)
    moved = AttentionPlan(*(t.to(device) for t in (plan.narrow, plan.merges, plan.wide)), has_parts=True)
    planned = on(case, device)
    planned = replace(planned, batch=replace(planned.batch, plan=moved))
    assert torch.equal(planned.run(kernel).cpu(), check(case, kernel, device))


def test_tensors_that_do_not_fit_are_refused(kernel: TritonAttention, device: torch.device) -> None:
    case = on(make_case([(1, 40), (4, 40)]), device)
    for wrong in (
        replace(case, query=case.query[:, :3]),
        replace(case, query=case.query[..., :8]),
        replace(case, query=case.query.double()),
        replace(case, key_cache=case.key_cache[:-1]),
        replace(case, key_cache=case.key_cache.mT.contiguous().mT, value_cache=case.value_cache.mT.contiguous().mT),
    ):
        with pytest.raises(RuntimeError, match=r"fit|one shape|one after another"):
            kernel(wrong.query, wrong.key, wrong.value, wrong.key_cache, wrong.value_cache, wrong.batch, wrong.scale)


@pytest.mark.gpu
def test_the_gpu_gets_the_triton_kernels() -> None:
    for dtype in DTYPES:
        assert choose(torch.device("cuda"), dtype)[0] == "triton"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_largest_batches_on_the_gpu(dtype: torch.dtype) -> None:
    """Compared with the reference on the GPU: too large for float64 on the CPU."""
    device = triton_device.prepare("cuda")
    built = build(device)
    assert built is not None
    rng = random.Random(1)
    lengths = [(1, rng.randint(1, 8192)) for _ in range(60)] + [(rng.randint(1, 500), 4000), (2048, 8192), (700, 700)]
    case = on(make_case(lengths, heads=32, kv_heads=8, head_dim=128, dtype=dtype), device)
    expected = reference(case.query, case.key, case.value, case.key_cache, case.value_cache, case.batch, case.scale)
    out = built(case.query, case.key, case.value, case.key_cache, case.value_cache, case.batch, case.scale)
    tolerance = 5e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
    torch.testing.assert_close(out, expected, rtol=2 * tolerance, atol=2 * tolerance)
