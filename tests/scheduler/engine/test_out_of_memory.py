"""A step for which the device has no memory is run again smaller, and nobody notices but the counters."""

from __future__ import annotations

import itertools
import time

import pytest
import torch

from softbatch.scheduler.model.batch import RaggedBatch
from softbatch.scheduler.model.kv_cache import StagedBlocks
from softbatch.scheduler.protocol import AddRequest, SamplingParams, SoftPromptRef
from softbatch.scheduler.step import OutOfDeviceMemory, Step
from tests.support.engines import build, check_empty
from tests.support.fake_runner import FakeRunner, make_scheduler, request
from tests.support.models import Reference, load_reference, make_soft_prompt, save_prompt


@pytest.fixture(scope="module")
def llama(tiny_models: dict[str, str]) -> Reference:
    return load_reference(tiny_models["llama"])


class SmallDevice:
    """A forward that runs out of memory in every step of more than so many tokens, or in those named by number."""

    def __init__(self, forward, most: int, failing: frozenset[int] = frozenset()) -> None:
        self._forward = forward
        self._most = most
        self._failing = failing
        self._calls = 0

    def __call__(self, batch: RaggedBatch) -> torch.Tensor:
        self._calls += 1
        if len(batch.token_ids) > self._most or self._calls in self._failing:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")
        return self._forward(batch)


@pytest.mark.parametrize("async_scheduling", ["off", "on"])
@pytest.mark.parametrize(("most", "failing"), [(1000, {4}), (1000, {1, 6, 12, 13, 20}), (9, set()), (3, set())])
def test_every_request_still_gets_its_tokens(
    llama: Reference, tmp_path, most: int, failing: set[int], async_scheduling: str
) -> None:
    limits = {"max_batch_size": 5, "max_batch_tokens": 24, "max_model_len": 120, "max_queue_size": 50}
    engine, ready = build(llama.path, num_blocks=40, async_scheduling=async_scheduling, **limits)
    runner = engine._runner
    runner._forward = SmallDevice(runner._forward, most, frozenset(failing))
    prompt = make_soft_prompt("embeddings", 19, ready.model)
    ref = SoftPromptRef("7" * 64, str(save_prompt(prompt, tmp_path, "p")), 19)
    prompts = [list(range(500 + i, 500 + i + length)) for i, length in enumerate((3, 14, 30, 1, 8, 21))]
    params = SamplingParams(max_tokens=9, temperature=0.0, ignore_eos=True)
    for index, ids in enumerate(prompts):
        soft = ref if index % 3 == 2 else None
        engine.handle(AddRequest(request_id=str(index), token_ids=ids, params=params, soft_prompt=soft))
    received: dict[str, list[int]] = {str(index): [] for index in range(len(prompts))}
    for _ in range(60_000):
        if not engine.has_work:
            break
        output = engine.step()
        engine.scheduler.check_integrity()
        assert not set(output.admitted) & set(output.preempted)
        for sequence in output.outputs:
            assert sequence.error is None
            received[sequence.request_id] += sequence.token_ids
    for index, ids in enumerate(prompts):
        expected = llama.generate(ids, 9, prompt if index % 3 == 2 else None)
        assert received[str(index)][: len(expected)] == expected, index
    # With async scheduling, a step is first tried again after the step in flight has released its memory.
    assert engine.stats.out_of_memory_total >= (max(1, len(failing)) if async_scheduling == "off" else most < 1000)
    check_empty(engine)


@pytest.mark.parametrize(
    ("told", "is_shortage"),
    [
        ("CUDA error: out of memory", True),
        ("Triton Error [CUDA]: out of memory", True),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("CUDA error: an illegal memory access was encountered", False),
    ],
)
def test_a_shortage_that_torchs_allocator_does_not_tell(llama: Reference, told: str, is_shortage: bool) -> None:
    """The driver and cuBLAS raise a plain RuntimeError."""
    engine, _ = build(llama.path, num_blocks=40, max_batch_size=5, max_batch_tokens=24, max_model_len=120)
    runner = engine._runner
    forward, calls = runner._forward, itertools.count()

    def failing_once(batch: RaggedBatch) -> torch.Tensor:
        if next(calls) == 0:
            raise RuntimeError(told)
        return forward(batch)

    runner._forward = failing_once
    for name in "ab":
        engine.handle(AddRequest(request_id=name, token_ids=[5, 6], params=SamplingParams(max_tokens=1)))
    output = engine.step()
    assert engine.stats.out_of_memory_total == int(is_shortage)
    assert output.preempted == (["b"] if is_shortage else [])
    assert [sequence.error for sequence in output.outputs] == [None] * (1 if is_shortage else 2)


@pytest.mark.parametrize("others", [0, 1])
def test_a_soft_prompt_that_finds_no_room_waits_for_those_who_run(llama: Reference, tmp_path, others: int) -> None:
    engine, ready = build(llama.path, num_blocks=40, max_batch_size=5, max_batch_tokens=24, max_model_len=120)
    prompt = make_soft_prompt("kv", 19, ready.model)
    ref = SoftPromptRef("7" * 64, str(save_prompt(prompt, tmp_path, "p")), 19)
    write, running = engine._runner._kv_cache.write, engine.scheduler.running

    def full(blocks: list[int], staged: StagedBlocks) -> None:
        if running or not others:
            raise torch.OutOfMemoryError("CUDA out of memory")
        write(blocks, staged)

    engine._runner._kv_cache.write = full
    params = SamplingParams(max_tokens=9, temperature=0.0, ignore_eos=True)
    for index in range(others):
        engine.handle(AddRequest(request_id=str(index), token_ids=[5, 6, 7], params=params))
        engine.step()
    engine.handle(AddRequest(request_id="soft", token_ids=[5, 6, 7], params=params, soft_prompt=ref))
    received: list[int] = []
    errors: list[str | None] = []
    for _ in range(60_000):
        if not engine.has_work:
            break
        for output in engine.step().outputs:
            if output.request_id == "soft":
                received += output.token_ids
                errors.append(output.error)
        time.sleep(0.001)
    if others:
        assert received == llama.generate([5, 6, 7], 9, prompt)
        assert not any(errors)
    else:
        assert errors == ["soft prompt: the device's memory is too small for this"]
        check_empty(engine)


@pytest.mark.parametrize("async_scheduling", ["off", "on"])
def test_what_never_fits_fails_alone(llama: Reference, async_scheduling: str) -> None:
    limits = {"max_batch_size": 5, "max_batch_tokens": 24, "max_model_len": 120}
    engine, _ = build(llama.path, num_blocks=40, async_scheduling=async_scheduling, **limits)
    runner = engine._runner
    runner._forward = SmallDevice(runner._forward, 0)
    engine.handle(AddRequest(request_id="a", token_ids=[5, 6, 7], params=SamplingParams(max_tokens=3)))
    outputs = [output for _ in range(3) if engine.has_work for output in engine.step().outputs]
    assert [output.finish_reason for output in outputs] == ["error"]
    assert "memory" in outputs[0].error
    assert engine.stats.out_of_memory_total == 2, "it was launched again although nothing could help"
    check_empty(engine)


def test_the_newest_leaves_and_nobody_comes_until_somebody_has_left() -> None:
    """Without a model."""
    scheduler = make_scheduler(max_batch_size=4, max_batch_tokens=64)
    runner = FakeRunner(scheduler)
    for name in "abc":
        scheduler.add(request(name, length=5, max_tokens=2 if name == "a" else 6))
    scheduler.postprocess(first := scheduler.schedule(), runner.run(first))
    scheduler.add(request("d", length=5))
    step = scheduler.schedule()
    assert [row.sequence.request_id for row in step.rows] == list("abcd")
    assert step.report.admitted == ["d"]
    assert scheduler.shrink(step)
    assert [row.sequence.request_id for row in step.rows] == list("abc")
    assert step.report.admitted == []
    assert step.report.preempted == ["d"]
    assert scheduler.shrink(step)
    assert step.report.preempted == ["d", "c"]
    outputs = scheduler.postprocess(step, runner.run(step))
    assert [o.request_id for o in outputs if o.finish_reason] == ["a"]
    scheduler.check_integrity()
    step = scheduler.schedule()  # "a" has left, so others may come again
    assert [row.sequence.request_id for row in step.rows] == list("bcd")
    assert scheduler.shrink(step)
    assert [row.sequence.request_id for row in scheduler.schedule().rows] == list("bc"), (
        "one came back although nobody had left"
    )
    assert scheduler.stats(1).out_of_memory_total == 3
    scheduler.check_integrity()


def test_one_alone_is_halved_until_a_token_is_left() -> None:
    scheduler = make_scheduler(max_batch_size=4, max_batch_tokens=64)
    scheduler.add(request("a", length=5))
    step: Step = scheduler.schedule()
    counts = []
    while scheduler.shrink(step):
        counts += [row.num_tokens for row in step.rows]
    assert counts == [2, 1]


def test_the_signal_needs_no_torch() -> None:
    assert OutOfDeviceMemory.__module__ == "softbatch.scheduler.step"
