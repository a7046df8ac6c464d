"""What only a GPU can show; everything else runs there and in Triton's interpreter."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from softbatch.scheduler.engine.engine import build_engine
from softbatch.scheduler.model.source import ModelError
from softbatch.scheduler.model.staging import ToHost
from softbatch.scheduler.protocol import AddRequest, EngineConfig, SamplingParams, SoftPromptRef
from tests.support.models import Reference, make_soft_prompt, save_prompt

pytestmark = pytest.mark.gpu
GREEDY = SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True)


def config(path: str, **values: object) -> EngineConfig:
    limits = {"max_batch_size": 4, "max_batch_tokens": 64, "max_model_len": 256, "dtype": "float32"}
    return EngineConfig(model=path, device="cuda", **(limits | values))


def add(engine, count: int, max_tokens: int) -> None:
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    for index in range(count):
        engine.handle(AddRequest(request_id=str(index), token_ids=[7 + index] * 20, params=params))


@contextmanager
def waits_counted() -> Iterator[list[str]]:
    """Fills with what torch says of every call that made the host wait for the GPU."""
    told: list[str] = []
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield told
        told += [str(w.message) for w in caught if "synchroniz" in str(w.message)]
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[ToHost]:
    """What the host has waited for by the event behind a copy, which torch does not tell of as of other waits."""
    waited_for: list[ToHost] = []
    read = ToHost.read

    def read_told(numbers: ToHost) -> list[list[float]]:
        waited_for.append(numbers)
        return read(numbers)

    monkeypatch.setattr(ToHost, "read", read_told)
    return waited_for


@pytest.mark.parametrize("async_scheduling", ["on", "off"])
def test_a_decoding_step_waits_for_its_tokens_alone(
    smollm2: Reference, reads: list[ToHost], async_scheduling: str
) -> None:
    engine, _ = build_engine(config(smollm2.path, kv_cache_gib=0.2, async_scheduling=async_scheduling), lambda *_: None)
    add(engine, 3, max_tokens=20)
    for _ in range(6):
        engine.step()
    reads.clear()
    with waits_counted() as waits:
        for _ in range(5):
            assert engine.step().batch_size == 3
    assert not waits
    assert len(reads) == 5


@pytest.mark.parametrize("kind", ["kv", "embeddings"])
def test_bringing_a_soft_prompt_in_waits_for_nothing(
    smollm2: Reference, tmp_path: Path, reads: list[ToHost], kind: str
) -> None:
    engine, ready = build_engine(config(smollm2.path, kv_cache_gib=0.2), lambda *_: None)
    prompt = make_soft_prompt(kind, 33, ready.model)
    ref = SoftPromptRef("7" * 64, str(save_prompt(prompt, tmp_path, kind)), 33)
    add(engine, 2, max_tokens=100)
    for _ in range(6):
        engine.step()
    engine.handle(AddRequest(request_id="soft", token_ids=[7] * 5, params=GREEDY, soft_prompt=ref))
    reads.clear()
    sampled, received = 0, []
    with waits_counted() as waits:
        while engine.has_work:
            outputs = engine.step().outputs
            sampled += any(output.token_ids for output in outputs)
            received += [token for output in outputs if output.request_id == "soft" for token in output.token_ids]
    assert not waits
    assert len(reads) == sampled
    expected = smollm2.generate([7] * 5, 5, prompt)
    assert received[: len(expected)] == expected
    assert len(received) == 5


def test_the_cache_takes_what_is_left_and_graphs_are_captured(smollm2: Reference) -> None:
    phases: dict[str, str] = {}
    used = {}
    for share in (0.3, 0.5):
        engine, ready = build_engine(
            config(smollm2.path, gpu_memory_utilization=share), lambda name, _, detail: phases.update({name: detail})
        )
        used[share] = ready.kv_bytes
        engine.close()
        del engine
        gc.collect()
        torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    assert used[0.5] - used[0.3] == pytest.approx(0.2 * total, rel=0.1)
    assert used[0.5] < total
    assert phases["CUDA graphs"] == "6 of 6 batch shapes, the largest of 64 tokens"
    assert phases["attention kernel"] == "triton"
    assert free > 0


def test_nothing_left_is_said_in_one_line(smollm2: Reference) -> None:
    with pytest.raises(ModelError, match=r"--gpu-memory-utilization 0.001 leaves .* GiB for the KV cache") as refused:
        build_engine(config(smollm2.path, gpu_memory_utilization=0.001), lambda *_: None)
    assert "\n" not in str(refused.value)


def test_a_real_shortage_of_memory_preempts_and_goes_on(smollm2: Reference) -> None:
    """Everything but a little is taken by somebody else while requests run. A prompt that is too long for a graph then
    finds no memory for its step, until it is alone and is computed in parts."""
    limits = {"max_batch_tokens": 4096, "max_model_len": 4096}
    engine, _ = build_engine(config(smollm2.path, kv_cache_gib=0.5, **limits), lambda *_: None)
    received: dict[str, list[int]] = {}
    preempted: list[str] = []

    def step() -> None:
        done = engine.step()
        preempted.extend(done.preempted)
        for output in done.outputs:
            assert output.error is None
            received.setdefault(output.request_id, []).extend(output.token_ids)

    # A library takes memory for itself the first time it multiplies so many rows: not in the midst of the shortage.
    for index, length in enumerate((3000, 1500, 750)):
        engine.handle(AddRequest(request_id=f"before-{index}", token_ids=[9] * length, params=GREEDY))
        while engine.has_work:
            step()
    add(engine, 3, max_tokens=30)
    step()
    engine.handle(AddRequest(request_id="long", token_ids=[5] * 3000, params=GREEDY))
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    left = 24 << 20
    while True:
        try:
            hog = torch.empty(free - left, dtype=torch.uint8, device="cuda")
            break
        except torch.OutOfMemoryError:  # not all that is free can be had in one piece
            left += 8 << 20
    while engine.has_work:
        step()
    del hog
    assert engine.stats.out_of_memory_total > 1, "there was memory enough: this has shown nothing"
    assert preempted == ["long"]
    assert len(received["long"]) == GREEDY.max_tokens
    for index in range(3):
        expected = smollm2.generate([7 + index] * 20, 30)
        assert received[str(index)][: len(expected)] == expected
        assert len(received[str(index)]) == 30
