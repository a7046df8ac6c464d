"""The loader: a soft prompt may be prefetched, which changes no answer and no count, and each load is timed once."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from softbatch.scheduler.engine.engine import Engine
from softbatch.scheduler.model.batch import RaggedBatch
from softbatch.scheduler.protocol import (
    AddRequest,
    CancelRequest,
    EngineStats,
    ForgetSoftPrompt,
    ModelInfo,
    SamplingParams,
    SoftPromptRef,
)
from tests.support.engines import build, check_empty, drain, tokens_of
from tests.support.models import Reference, load_reference, make_soft_prompt, save_prompt

PROMPT_TOKENS = [11, 12, 13]


@pytest.fixture(scope="module")
def reference(tiny_models: dict[str, str]) -> Reference:
    return load_reference(tiny_models["llama"])


@pytest.fixture
def served(reference: Reference) -> tuple[Engine, ModelInfo]:
    engine, ready = build(reference.path, num_blocks=32, max_batch_size=2, max_batch_tokens=64, max_model_len=96)
    return engine, ready.model


def asking(name: str, ref: SoftPromptRef) -> AddRequest:
    params = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
    return AddRequest(request_id=name, token_ids=PROMPT_TOKENS, params=params, soft_prompt=ref)


def told_by(reference: Reference, kind: str, info: ModelInfo, where: Path) -> tuple[SoftPromptRef, list[int]]:
    """A soft prompt, and what transformers answers with it."""
    prompt = make_soft_prompt(kind, 21, info)
    ref = SoftPromptRef("a" * 64, str(save_prompt(prompt, where, "a")), 21)
    return ref, reference.generate(PROMPT_TOKENS, 6, prompt)


def await_read(engine: Engine) -> None:
    for _ in range(60_000):
        if all(read.staged.done() for read in engine.loader._reads.values()):
            return
        time.sleep(0.005)
    raise AssertionError("it was not read")


@pytest.mark.parametrize("kind", ["kv", "embeddings"])
def test_its_request_is_answered_as_always(
    served: tuple[Engine, ModelInfo], reference: Reference, kind: str, tmp_path: Path
) -> None:
    engine, info = served
    ref, expected = told_by(reference, kind, info, tmp_path)
    first, second = asking("first", ref), asking("second", ref)

    engine.prefetch(first)
    assert engine.loader.num_reading == 1
    await_read(engine)
    engine.handle(first)
    output = engine.step()
    assert output.num_tokens == (len(PROMPT_TOKENS) if kind == "kv" else 21), "the step goes to work at once"
    if kind == "kv":  # those of the other kind have to be computed first
        assert output.admitted == ["first"], "it did not have to wait"
        assert len(output.soft_prompt_load_seconds) == 1
        assert output.outputs[0].token_ids == expected[:1]
    engine.handle(CancelRequest(["first"]))

    engine.prefetch(second)
    assert engine.loader.num_reading == 0, "it is there already"
    assert tokens_of(drain(engine, [second])["second"]) == expected
    check_empty(engine)


def counts(stats: EngineStats) -> tuple[int, int]:
    return stats.soft_prompt_hits_total, stats.soft_prompt_misses_total


@pytest.mark.parametrize("prefetched", [False, True])
def test_the_first_use_counts_as_a_miss_and_later_ones_as_hits(
    served: tuple[Engine, ModelInfo], prefetched: bool, tmp_path: Path
) -> None:
    engine, info = served
    ref = SoftPromptRef("a" * 64, str(save_prompt(make_soft_prompt("kv", 21, info), tmp_path, "a")), 21)
    for number, expected in enumerate([(0, 1), (1, 1), (2, 1)]):
        request = asking(f"r{number}", ref)
        if prefetched:
            engine.prefetch(request)
            await_read(engine)
        drain(engine, [request])
        assert counts(engine.stats) == expected


def test_who_becomes_resident_and_who_goes_is_told_once(served: tuple[Engine, ModelInfo], tmp_path: Path) -> None:
    engine, info = served
    ref = SoftPromptRef("a" * 64, str(save_prompt(make_soft_prompt("kv", 21, info), tmp_path, "a")), 21)
    assert engine.resident_if_changed() is None
    engine.handle(asking("r", ref))
    told = []
    while engine.has_work:
        told.append(engine.step().resident)
    assert [each for each in told if each is not None] == [["a" * 64]]
    engine.handle(ForgetSoftPrompt(ref.sha256))
    assert engine.resident_if_changed() == []
    assert engine.resident_if_changed() is None


def test_nothing_is_prefetched_while_others_wait(served: tuple[Engine, ModelInfo], tmp_path: Path) -> None:
    engine, info = served
    refs = [
        SoftPromptRef(name * 64, str(save_prompt(make_soft_prompt("kv", 5, info, seed=i), tmp_path, name)), 5)
        for i, name in enumerate("abcd")
    ]
    for ref in refs:
        engine.prefetch(asking("any", ref))
    assert engine.loader.num_reading == 2, "as many as there are slots"
    await_read(engine)
    engine.step()
    engine.handle(asking("waits", refs[3]))
    engine.prefetch(asking("comes later", refs[2]))
    assert engine.loader.num_reading == 0


def test_a_broken_file_fails_its_request_and_a_request_that_never_comes_leaves_nothing(
    served: tuple[Engine, ModelInfo], tmp_path: Path
) -> None:
    engine, info = served
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"not a soft prompt")
    request = asking("broken", SoftPromptRef("b" * 64, str(broken), 5))
    engine.prefetch(request)
    await_read(engine)
    engine.step()
    assert engine.scheduler.soft_prompts.get("b" * 64) is None
    assert [output.finish_reason for output in drain(engine, [request])["broken"]] == ["error"]

    path = save_prompt(make_soft_prompt("kv", 5, info), tmp_path, "never")
    engine.prefetch(asking("never", SoftPromptRef("c" * 64, str(path), 5)))
    await_read(engine)
    engine.step()
    assert engine.scheduler.soft_prompts.get("c" * 64) is None
    assert not engine.has_work
    check_empty(engine)


@pytest.mark.parametrize("kind", ["kv", "embeddings"])
def test_reading_once_more_what_is_there_changes_nothing(
    served: tuple[Engine, ModelInfo], reference: Reference, kind: str, tmp_path: Path
) -> None:
    """The thread that expects a request may be late: its soft prompt has been read and placed meanwhile."""
    engine, info = served
    ref, expected = told_by(reference, kind, info, tmp_path)
    for name in ("first", "second"):
        assert tokens_of(drain(engine, [asking(name, ref)])[name]) == expected
        engine.loader.read(ref)
        await_read(engine)
        engine.step()
        engine.scheduler.check_integrity()


def test_reading_opens_no_team_of_threads(served: tuple[Engine, ModelInfo]) -> None:
    before = torch.get_num_threads()
    assert served[0].loader._thread.submit(torch.get_num_threads).result() == 1
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("kind", ["kv", "embeddings", "embeddings that fail"])
def test_a_load_is_timed_once_if_it_succeeds(
    served: tuple[Engine, ModelInfo], kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, info = served
    forward = engine._runner._forward

    def broken_on_soft_prompts(batch: RaggedBatch) -> torch.Tensor:
        if batch.embeddings:
            raise RuntimeError("broken")
        return forward(batch)

    if kind == "embeddings that fail":
        monkeypatch.setattr(engine._runner, "_forward", broken_on_soft_prompts)
    prompt = make_soft_prompt("kv" if kind == "kv" else "embeddings", 21, info)
    ref = SoftPromptRef("a" * 64, str(save_prompt(prompt, tmp_path, "a")), 21)
    engine.handle(asking("first", ref))
    engine.handle(asking("second", ref))
    seconds: list[float] = []
    while engine.has_work:
        seconds += engine.step().soft_prompt_load_seconds
    assert len(seconds) == (0 if kind == "embeddings that fail" else 1)
    assert all(0 < one < 60 for one in seconds)
    assert not engine.loader._prefilling
    check_empty(engine)
