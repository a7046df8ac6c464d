"""Both attention backends against torch's own attention in float64 on contiguous data, and the CPU kernel's build."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from softbatch.prompt_store.compression.frozen.prefix import attend
from softbatch.scheduler.model.attention import choose, cpu
from softbatch.scheduler.model.attention.backend import AttentionBackend, AttentionKind
from softbatch.scheduler.model.attention.reference import reference
from softbatch.scheduler.model.cpu import ops
from softbatch.scheduler.model.cpu.build import _cached_library
from softbatch.scheduler.model.cpu.prebuilt import content_of_sources
from tests.support.attention_cases import KINDS, NAN, RAGGED, Case, make_case, of_kind
from tests.support.models import in_threads

ROOT = Path(__file__).parents[3]
COMPILE_ONCE = ROOT / "tests" / "support" / "compile_once.py"
needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")


@pytest.fixture(scope="session")
def kernel() -> AttentionBackend:
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    built = cpu.build()
    assert built is not None
    return built


@pytest.mark.parametrize("dtype", cpu.DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [16, 64, 96, 128, 256])
@pytest.mark.parametrize(
    ("group", "block_size"), [(1, 16), (3, 1), (3, 16), (4, 32), (8, 8)], ids=lambda value: str(value)
)
def test_ragged_batches(
    kernel: AttentionBackend, group: int, block_size: int, head_dim: int, dtype: torch.dtype
) -> None:
    make_case(RAGGED, heads=2 * group, kv_heads=2, head_dim=head_dim, block_size=block_size, dtype=dtype).check(
        kernel, reference
    )


@pytest.mark.parametrize("dtype", cpu.DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [1, 5, 8, 24, 40, 72, 80])
def test_head_sizes_that_fill_no_vector(kernel: AttentionBackend, head_dim: int, dtype: torch.dtype) -> None:
    make_case(RAGGED[:6], heads=5, kv_heads=5, head_dim=head_dim, dtype=dtype).check(kernel, reference)


@pytest.mark.parametrize("dtype", cpu.DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_windows_softcaps_and_sinks(kernel: AttentionBackend, kind: str, dtype: torch.dtype) -> None:
    of_kind(make_case(RAGGED, heads=9, kv_heads=3, head_dim=64, dtype=dtype), kind).check(kernel, reference)


@pytest.mark.parametrize("dtype", cpu.DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 1, 256), (6, 6, 40), (12, 2, 16)])
def test_windows_softcaps_and_sinks_together(
    kernel: AttentionBackend, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype
) -> None:
    case = make_case(RAGGED, heads=heads, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype)
    of_kind(case, "all").check(kernel, reference)


@pytest.mark.parametrize("kind", KINDS)
def test_sequences_that_share_a_long_context_in_layers_of_other_kinds(kernel: AttentionBackend, kind: str) -> None:
    case = make_case(_TREE, heads=12, kv_heads=2, head_dim=64, begins_like=_LIKE)
    of_kind(case, kind).check(kernel, reference)


@pytest.mark.parametrize("kind", KINDS)
def test_a_chunk_is_the_same_in_pieces(kernel: AttentionBackend, kind: str) -> None:
    """A row's result does not depend on the rows beside it, though each group of rows has its own first visible key."""
    whole = of_kind(make_case([(900, 2500)], head_dim=32), kind)
    out = whole.run(kernel)
    for first, end in ((0, 900), (3, 70), (70, 900), (450, 453)):
        batch = replace(
            whole.batch,
            query_start=torch.tensor([0, end - first], dtype=torch.int32),
            context_len=torch.tensor([1600 + end], dtype=torch.int32),
            slot_mapping=whole.batch.slot_mapping[first:end],
        )
        written = whole.key_cache.clone(), whole.value_cache.clone()
        for cache, new in zip(written, (whole.key, whole.value), strict=True):
            slots = whole.batch.slot_mapping
            cache[slots // 16, :, slots % 16] = new
        rows = (tensor[first:end] for tensor in (whole.query, whole.key, whole.value))
        assert torch.equal(kernel(*rows, *written, batch, whole.scale, whole.kind), out[first:end])


@pytest.mark.parametrize("softcap", [0.01, 50.0, 1e4])
def test_softcaps_of_any_size(kernel: AttentionBackend, softcap: float) -> None:
    case = replace(make_case([(1, 300), (40, 90)], head_dim=64), scale=4.0, kind=AttentionKind(softcap=softcap))
    case.check(kernel, reference)


@pytest.mark.parametrize("sink", [-1e4, 1e4])
def test_sinks_of_any_size(kernel: AttentionBackend, sink: float) -> None:
    case = make_case([(1, 1300), (40, 90)])
    case = replace(case, kind=AttentionKind(sinks=torch.full((4,), sink)))
    case.check(kernel, reference)
    assert (case.run(kernel).abs().max() == 0) == (sink > 0)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (AttentionKind(window=-1), "must not be negative"),
        (AttentionKind(softcap=-1.0), "must not be negative"),
        (AttentionKind(sinks=torch.zeros(3)), "one number for each head"),
    ],
)
def test_kinds_that_cannot_be_are_refused(kernel: AttentionBackend, kind: AttentionKind, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        replace(make_case([(1, 5)]), kind=kind).run(kernel)


def test_a_block_size_that_is_no_power_of_two(kernel: AttentionBackend) -> None:
    make_case(RAGGED, heads=9, kv_heads=3, block_size=13).check(kernel, reference)


@settings(derandomize=True, deadline=None, max_examples=200)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 40), st.one_of(st.just(0), st.integers(0, 300))), min_size=1, max_size=7),
    decode=st.lists(st.booleans(), min_size=7, max_size=7),
    group=st.integers(1, 9),
    kv_heads=st.integers(1, 4),
    head_dim=st.sampled_from([8, 16, 32, 48, 64]),
    block_size=st.sampled_from([1, 4, 8, 16, 32]),
    dtype=st.sampled_from(cpu.DTYPES),
    shared_blocks=st.integers(0, 3),
    seed=st.integers(0, 1 << 20),
)
def test_any_batch(
    kernel: AttentionBackend,
    lengths: list[tuple[int, int]],
    decode: list[bool],
    group: int,
    kv_heads: int,
    head_dim: int,
    block_size: int,
    dtype: torch.dtype,
    shared_blocks: int,
    seed: int,
) -> None:
    queries = [1 if one else length for (length, _), one in zip(lengths, decode, strict=False)]
    make_case(
        [(n, n + before + shared_blocks * block_size) for n, (_, before) in zip(queries, lengths, strict=True)],
        heads=group * kv_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        block_size=block_size,
        dtype=dtype,
        shared_blocks=shared_blocks,
        seed=seed,
    ).check(kernel, reference)


@pytest.mark.parametrize("dtype", cpu.DTYPES, ids=str)
def test_sequences_that_share_blocks(kernel: AttentionBackend, dtype: torch.dtype) -> None:
    lengths = [(1, 33), (4, 36), (1, 700), (20, 52), (1, 34)]
    make_case(lengths, block_size=8, shared_blocks=4, dtype=dtype).check(kernel, reference)


# Decoding sequences as a tree: twelve begin alike, most of them for 320 keys; six, and a chunk of 30, go on to 2,400,
# four to 640. One ends within a range, one has nothing in common with the others.
_TREE = [(1, 2450 + 40 * n) for n in range(6)] + [(1, 321), (1, 320), (30, 2500), (1, 1300)] + [(1, 700)] * 4
_LIKE = dict.fromkeys((1, 2, 3, 4, 5, 8), (0, 2400 // 16)) | {6: (0, 20), 7: (0, 19), 10: (0, 20)}
_LIKE |= dict.fromkeys((11, 12, 13), (10, 640 // 16))


@pytest.mark.parametrize("dtype", cpu.DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(9, 3, 64), (8, 1, 128), (2, 2, 40), (48, 2, 16)])
def test_decoding_sequences_that_share_a_long_context(
    kernel: AttentionBackend, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype
) -> None:
    case = make_case(_TREE, heads=heads, kv_heads=kv_heads, head_dim=head_dim, begins_like=_LIKE, dtype=dtype)
    case.check(kernel)
    out = case.run(kernel)
    for count in (1, 2, 5):
        with in_threads(count):
            assert torch.equal(case.run(kernel), out)


@pytest.mark.parametrize(("shared", "same"), [(240, True), (256, False)])
def test_few_shared_keys_leave_a_result_as_it_is_alone(kernel: AttentionBackend, shared: int, same: bool) -> None:
    blocks = shared // 16
    case = make_case([(1, 400)] * 8, heads=6, head_dim=64, shared_blocks=blocks, dtype=torch.bfloat16)
    out = case.run(kernel)
    alone = [case.alone(s).run(kernel) for s in range(8)]
    assert torch.equal(torch.cat(alone), out) == same


@pytest.mark.parametrize("dtype", cpu.DTYPES, ids=str)
def test_nan_stays_in_its_sequence_where_keys_are_shared(kernel: AttentionBackend, dtype: torch.dtype) -> None:
    case = make_case([(1, 400)] * 8, heads=6, head_dim=64, shared_blocks=20, dtype=dtype)
    case.query[3] = NAN
    out = case.run(kernel)
    assert out[3].isnan().all()
    out[3] = 0
    assert out.isfinite().all()


@settings(derandomize=True, deadline=None, max_examples=100)
@given(
    tree=st.lists(st.tuples(st.integers(0, 100), st.integers(0, 1000), st.integers(1, 200)), min_size=4, max_size=24),
    first=st.integers(200, 1300),
    block_size=st.sampled_from([1, 8, 16, 24, 64, 100]),
    dtype=st.sampled_from(cpu.DTYPES),
    seed=st.integers(0, 1 << 20),
)
def test_any_tree_of_shared_blocks(
    kernel: AttentionBackend,
    tree: list[tuple[int, int, int]],
    first: int,
    block_size: int,
    dtype: torch.dtype,
    seed: int,
) -> None:
    """Each sequence begins like an earlier one, to a place anywhere in that, or most often to its end."""
    lengths = [(1, first)]
    like = {}
    for s, (other, permille, own) in enumerate(tree, start=1):
        most = (lengths[other % s][1] - 1) // block_size
        like[s] = (other % s, min(most, most * 2 * permille // 1000))
        lengths.append((1, like[s][1] * block_size + own))
    make_case(
        lengths, heads=6, kv_heads=2, head_dim=16, block_size=block_size, begins_like=like, dtype=dtype, seed=seed
    ).check(kernel)


@pytest.mark.parametrize("dtype", cpu.DTYPES, ids=str)
@pytest.mark.parametrize(("length", "tokens"), [(1, 1), (64, 7), (300, 40), (1100, 1)])
def test_rows_behind_one_prefix(kernel: AttentionBackend, length: int, tokens: int, dtype: torch.dtype) -> None:
    """Against the form of it that has gradients, in float64."""
    generator = torch.Generator().manual_seed(length)
    shapes = [(5, 6, tokens, 24), (5, 2, tokens, 24), (5, 2, tokens, 24), (2, length, 24), (2, length, 24)]
    tensors = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    found = cpu.behind_prefix(*tensors, 0.3)  # type: ignore[call-arg]
    expected = attend(*(tensor.double() for tensor in tensors), 0.3)  # type: ignore[call-arg]
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5 + 4 * torch.finfo(dtype).eps)


def test_a_batch_of_nothing(kernel: AttentionBackend) -> None:
    case = make_case([])
    for backend in (kernel, reference):
        assert case.run(backend).shape == (0, 4, 16)


def test_a_sequence_without_query_tokens(kernel: AttentionBackend) -> None:
    make_case([(1, 20), (0, 30), (3, 5)]).check(kernel, reference)


@pytest.mark.parametrize("layout", ["fused", "transposed", "every other column"])
@pytest.mark.parametrize("dtype", cpu.DTYPES, ids=str)
def test_inputs_need_not_be_contiguous(kernel: AttentionBackend, layout: str, dtype: torch.dtype) -> None:
    case = make_case([(1, 20), (9, 30), (1, 1)], heads=6, kv_heads=2, dtype=dtype)
    tensors = (case.query, case.key, case.value)
    if layout == "fused":
        views = list(torch.cat(tensors, dim=1).split([6, 2, 2], dim=1))
    elif layout == "transposed":
        views = [t.transpose(0, 1).contiguous()[None][0].transpose(0, 1) for t in tensors]
    else:
        views = [torch.stack([t, torch.full_like(t, NAN)], dim=-1)[..., 0] for t in tensors]
    assert not any(view.is_contiguous() for view in views)
    replace(case, query=views[0], key=views[1], value=views[2]).check(kernel, reference)


def test_a_block_table_may_be_a_view_of_a_wider_one(kernel: AttentionBackend) -> None:
    case = make_case([(1, 40), (3, 70)])
    wide = torch.full((2, 50), -1, dtype=torch.int32)
    view = wide[:, : case.batch.block_table.shape[1]]
    view.copy_(case.batch.block_table)
    replace(case, batch=replace(case.batch, block_table=view)).check(kernel, reference)


def test_layers_may_lie_in_one_tensor(kernel: AttentionBackend) -> None:
    case = make_case([(1, 40), (3, 70)])
    both = torch.stack([case.key_cache, case.value_cache], dim=1)  # [num_blocks, 2, …]: strided over the blocks
    out = kernel(case.query, case.key, case.value, both[:, 0], both[:, 1], case.batch, case.scale)
    case.assert_near(out, case.expected())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [0.0, 1e-3, -0.125, 30.0])
def test_scores_of_any_size(kernel: AttentionBackend, scale: float, dtype: torch.dtype) -> None:
    """30 · q·k reaches several hundred: exp() without the running maximum would overflow."""
    case = replace(make_case([(1, 600), (50, 300), (1, 5)], head_dim=64, dtype=dtype), scale=scale)
    if dtype == torch.bfloat16:
        return case.check(kernel)
    expected = case.expected()
    for backend in (kernel, reference):
        torch.testing.assert_close(case.run(backend).double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_half_precision_number_comes_back(kernel: AttentionBackend, dtype: torch.dtype) -> None:
    """With one key its weight is 1, so the output is the value itself: all 65536 of them, but that processors
    that multiply bfloat16 as it is take its denormal numbers for zero."""
    numbers = torch.arange(1 << 16).to(torch.uint16).view(dtype).view(-1, 1, 64)
    case = replace(make_case([(1, 1)] * 1024, heads=1, kv_heads=1, head_dim=64, dtype=dtype), value=numbers)
    out = case.run(kernel)
    if dtype == torch.bfloat16:
        denormal = numbers.abs() < torch.finfo(dtype).tiny
        assert ((out == numbers) | (out == 0))[denormal].all()
        out = torch.where(denormal, numbers, out)
    torch.testing.assert_close(out, numbers, rtol=0, atol=0, equal_nan=True)


def test_the_result_does_not_depend_on_the_batch_or_the_threads(kernel: AttentionBackend) -> None:
    lengths = [(1, 1500), (40, 1200), (1, 30), (7, 600)]
    case = make_case(lengths, heads=6, kv_heads=3, head_dim=64, dtype=torch.bfloat16)
    out = case.run(kernel)
    for count in (1, 2, 5):
        with in_threads(count):
            assert torch.equal(case.run(kernel), out)
    start = case.batch.query_start.tolist()
    for s in range(len(lengths)):
        assert torch.equal(case.alone(s).run(kernel), out[start[s] : start[s + 1]])


@pytest.mark.parametrize("broken", range(4))
def test_nan_stays_in_its_sequence_and_is_not_hidden(kernel: AttentionBackend, broken: int) -> None:
    case = make_case([(1, 90), (20, 90), (1, 700), (3, 3)])
    start = case.batch.query_start.tolist()
    rows = slice(start[broken], start[broken + 1])
    case.query[rows] = NAN
    for backend in (kernel, reference):
        out = case.run(backend)
        assert out[rows].isnan().all()
        out[rows] = 0
        assert out.isfinite().all()


def _wrong(case: Case, name: str, change: Any) -> Case:
    if hasattr(case.batch, name):
        return replace(case, batch=replace(case.batch, **{name: change(getattr(case.batch, name))}))
    return replace(case, **{name: change(getattr(case, name))})


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("query", lambda t: t.double(), "one dtype"),
        ("query", lambda t: t[:-1], "query's tokens"),
        ("query", lambda t: t[:, :3], "multiple of kv_heads"),
        ("query", lambda t: t[..., :8], "head_dim"),
        ("query", lambda t: t[0], r"\[T, heads, head_dim\]"),
        ("key", lambda t: t[:, :1], "one shape"),
        ("key_cache", lambda t: t[:-1], "one shape and layout"),
        ("key_cache", lambda t: t.half(), "one dtype"),
        ("query_start", lambda t: t.long(), "query_start must be Int"),
        ("query_start", lambda t: t[1:], "one entry more"),
        ("query_start", lambda t: t + 1, "begin with 0"),
        ("query_start", lambda t: t.flip(0) - t.flip(0)[0] + t, "begin with 0|decrease"),
        ("context_len", lambda t: t - 39, "shorter than its query"),
        ("context_len", lambda t: t + 1000, "exceeds its block table"),
        ("block_table", lambda t: t + 1000, "names block"),
        ("block_table", lambda t: t - 1000, "names block"),
        ("block_table", lambda t: t[:1], "one row per sequence"),
        ("block_table", lambda t: t[0], "2 dimension"),
        ("slot_mapping", lambda t: t[1:], "must have [0-9]+ entries"),
        ("slot_mapping", lambda t: t + 100_000, "not from 0 to below"),
        ("slot_mapping", lambda t: -1 - t, "not from 0 to below"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_before_anything_is_written(
    kernel: AttentionBackend, name: str, change: Any, message: str
) -> None:
    case = make_case([(1, 40), (4, 40)], kv_heads=2)
    wrong = _wrong(case, name, change)
    caches = wrong.key_cache.clone(), wrong.value_cache.clone()
    with pytest.raises(RuntimeError, match=message):
        kernel(wrong.query, wrong.key, wrong.value, *caches, wrong.batch, wrong.scale)
    torch.testing.assert_close(caches[0], wrong.key_cache, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(caches[1], wrong.value_cache, rtol=0, atol=0, equal_nan=True)


def test_the_operator_is_described_truly_to_torch_compile(kernel: AttentionBackend) -> None:
    case = make_case([(1, 40), (4, 40)])
    batch = case.batch
    arguments = (
        case.query,
        case.key,
        case.value,
        case.key_cache.nan_to_num(),
        case.value_cache.nan_to_num(),
        batch.query_start,
        batch.context_len,
        batch.block_table,
        batch.slot_mapping,
        case.scale,
    )
    torch.library.opcheck(ops.operator("paged_attention"), arguments, test_utils=("test_schema", "test_faketensor"))


@needs_compiler
def test_choose() -> None:
    for dtype in cpu.DTYPES:
        assert choose(torch.device("cpu"), dtype) == ("cpu", cpu.paged_attention)
    assert choose(torch.device("cpu"), torch.float64) == ("reference", reference)
    assert choose(torch.device("meta"), torch.float32) == ("reference", reference)


# ---- the build, each in a process of its own with an empty cache -----------------------------------------------

START = """
import logging, sys
logging.basicConfig(level="INFO", format="%(levelname)s %(message)s")
import torch
from softbatch.scheduler.model.attention import choose
from softbatch.scheduler.model.cpu.build import begin_to_build
begin_to_build()
name, backend = choose(torch.device("cpu"), torch.float32)
print(name)
if name == "cpu" and "check" in sys.argv:
    torch.set_num_threads(1)
    from tests.support.attention_cases import RAGGED, make_case
    make_case(RAGGED, heads=14, kv_heads=2, head_dim=40).check(backend)
    make_case(RAGGED, heads=6, kv_heads=2, head_dim=64, dtype=torch.bfloat16).check(backend)
    make_case(RAGGED, heads=2, kv_heads=2, head_dim=24, dtype=torch.float16).check(backend)
    from tests.scheduler.model import test_decoder
    for name in test_decoder.CONFIGS:
        test_decoder.test_float32_equals_transformers(name)
    from softbatch.scheduler.model.cpu.formats import WeightFormat
    for weights in (WeightFormat.FLOAT32, WeightFormat.BFLOAT16, WeightFormat.INT8, WeightFormat.GGUF_BLOCKS):
        test_decoder.test_near_transformers_in_every_format(weights)
    from tests.scheduler.model import test_gguf_blocks
    for kind in test_gguf_blocks.BlockKind:
        test_gguf_blocks.test_products_are_near_the_exact_ones(kind, 33, 3)
    from tests.scheduler.model import test_kv_packing
    for packing in test_kv_packing.PACKINGS:
        for weights in (WeightFormat.FLOAT32, WeightFormat.BFLOAT16):
            test_kv_packing.test_the_decoder_attends_over_the_packed_rows(packing, "qwen3", weights)
        test_kv_packing.test_what_is_not_finite_does_not_come_out_as_a_number(packing, float("inf"))
    test_kv_packing.test_no_number_is_further_off_than_its_step_allows()
    print("checked")
"""


# One of the compiler's arguments by another.
REPLACE = 'for a in "$@"; do [ "$a" = %s ] && a=%s; set -- "$@" "$a"; shift; done'


def start(cache: Path, compiler: Path | str, *arguments: str) -> subprocess.Popen[str]:
    environment = os.environ | {"XDG_CACHE_HOME": str(cache), "CXX": str(compiler), "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", START, *arguments],
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[list[str], str]:
    """Its output's lines, and its log."""
    output, log = process.communicate(timeout=250)
    assert process.returncode == 0, log
    return output.split(), log


@pytest.fixture(scope="session")
def objects(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What was compiled of just these sources, by this compiler for this torch, in this run of the tests or before."""
    compiler = subprocess.check_output(["c++", "--version"])
    parts = (content_of_sources(), COMPILE_ONCE.read_bytes(), compiler, torch.__version__.encode())
    state = hashlib.sha256(b"".join(parts)).hexdigest()[:16]
    cache: pytest.Cache | None = getattr(request.config, "cache", None)
    root = cache.mkdir("kernels") if cache else tmp_path_factory.mktemp("kernels")
    for other in root.iterdir():
        if other.name != state:
            shutil.rmtree(other, ignore_errors=True)
    return root / state


def quick_compiler(directory: Path, first: str, objects: Path) -> Path:
    """One that runs the shell command `first`, and compiles nothing twice."""
    return script(directory / "g++", f'{first}\nexec "{sys.executable}" "{COMPILE_ONCE}" "{objects}" "$@"')


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.mark.long
@needs_compiler
def test_processes_that_start_together_share_a_cache(tmp_path: Path, objects: Path) -> None:
    """Also: a compiler that lacks -march=native builds a portable kernel, and a built one needs no compiler.

    It optimises less than it is told, to be done sooner: what is portable is in the sources.
    """
    lacks_native = 'case " $* " in *" -march=native "*) echo "error: bad value native" >&2; exit 1;; esac'
    old_compiler = quick_compiler(tmp_path, f"{lacks_native}\n{REPLACE % ('-O3', '-O1')}", objects)
    cache = tmp_path / "cache"
    together = [start(cache, old_compiler), start(cache, old_compiler)]
    for output, log in map(finish, together):
        assert output == ["cpu"]
        assert "WARNING" not in log
    (directory,) = (cache / "softbatch" / "kernels").iterdir()
    assert [path.name for path in directory.iterdir()] == ["softbatch_cpu.so"]

    output, log = finish(start(cache, "/nonexistent", "check"))
    assert output == ["cpu", "checked"]
    assert "compiling" not in log


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        (None, "no C++ compiler: /nonexistent is not on the PATH"),
        ('echo "kernel.cpp:1:1: error: no such header" >&2; exit 1', "kernel.cpp:1:1: error: no such header"),
    ],
)
def test_without_a_compiler_plain_torch_takes_over_with_one_warning(
    tmp_path: Path, compiler: str | None, reason: str
) -> None:
    path = script(tmp_path / "g++", compiler) if compiler else "/nonexistent"
    output, log = finish(start(tmp_path / "cache", path))
    assert output == ["reference"]
    (warning,) = (line for line in log.splitlines() if line.startswith("WARNING the CPU kernels"))
    assert reason in warning
    assert "Install a C++ compiler" in warning


def test_a_damaged_kernel_in_the_cache_is_compiled_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With no compiler at hand the attempt shows in the warning. What killed processes left long ago goes."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library = _cached_library()
    assert library is not None
    library.write_bytes(b"damaged")
    abandoned, at_work = library.parent / ".building-old", library.parent / ".building-new"
    for directory in (abandoned, at_work):
        directory.mkdir()
        (directory / "decoder.o").touch()
    os.utime(abandoned, (0, 0))
    output, log = finish(start(tmp_path, "/nonexistent"))
    assert output == ["reference"]
    assert "cannot be built (no C++ compiler" in log
    assert sorted(library.parent.iterdir()) == [at_work, library]


@pytest.mark.long
@needs_compiler
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the instruction set is x86-64's")
def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path, objects: Path) -> None:
    """Also: kernels for AVX2."""
    compiler = quick_compiler(tmp_path, REPLACE % ("-march=native", "-march=x86-64-v3"), objects)
    (tmp_path / "file").write_text("not a directory")
    output, _ = finish(start(tmp_path / "file", compiler, "check"))
    assert output == ["cpu", "checked"]
