"""Async scheduling gives the same answers as synchronous scheduling.

`test_exactness.py` and `test_gpu_path.py` compare greedy output of both with transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from softbatch.scheduler.engine.engine import Engine
from softbatch.scheduler.model import runner
from softbatch.scheduler.model.batch import RaggedBatch
from softbatch.scheduler.model.in_flight import InFlightStep
from softbatch.scheduler.model.runner import Runner
from softbatch.scheduler.model.sampling.adjustments import SampleInput
from softbatch.scheduler.model.sampling.sampler import Samples, sample
from softbatch.scheduler.protocol import AddRequest, CancelRequest, SamplingParams, SequenceOutput, SoftPromptRef
from softbatch.scheduler.step import Step, StepResult
from tests.support.engines import build, check_empty, drain, make_request, tokens_of
from tests.support.models import load_reference, make_soft_prompt, save_prompt

SAMPLED: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 0.0, "repetition_penalty": 1.7},
    {"temperature": 0.0, "presence_penalty": 1.5, "frequency_penalty": 0.5},
    {"temperature": 1.0, "seed": 5, "logprobs": 3},
    {"temperature": 0.8, "seed": 6, "top_p": 0.9, "repetition_penalty": 1.2},
    {"temperature": 3.0, "seed": 7, "top_p": 0.9999, "logprobs": 2},  # keeps more than the sampler looks at first
    {"temperature": 0.0, "logit_bias": dict.fromkeys(range(50), 9.0), "logprobs": 1},
    {"temperature": 1.0, "seed": 9, "allowed_token_ids": (5, 6, 7, 8), "bad_words": ((5, 6), (7, 8), (6, 5, 7))},
    {"temperature": 1.0, "seed": 8, "top_k": 40, "min_p": 0.01, "stop_token_ids": tuple(range(0, 49152, 9))},
)


@pytest.fixture(scope="module")
def llama(tiny_models: dict[str, str]) -> str:
    return tiny_models["llama"]


def engine_of(path: str, async_scheduling: str, num_blocks: int = 200) -> Engine:
    limits = {"max_batch_size": 8, "max_batch_tokens": 24, "max_model_len": 64, "max_queue_size": 50}
    return build(path, num_blocks=num_blocks, block_size=4, async_scheduling=async_scheduling, **limits)[0]


def requests() -> list[AddRequest]:
    """Some of which are scored."""
    sampled = [
        make_request(f"{i}", [40 + i, 7, 9 * i + 3, *range(600, 600 + 5 * i)], max_tokens=12 + i, **params)
        for i, params in enumerate(SAMPLED)
    ]
    params = SamplingParams(max_tokens=0)
    scored = [
        AddRequest(request_id=f"s{n}", token_ids=list(range(300, 300 + n)), params=params, score_from=2)
        for n in (3, 40)
    ]
    continued = msgspec.structs.replace(sampled[2], request_id="both", score_from=1, score_top=2)
    return [*sampled[:4], *scored, continued, *sampled[4:]]


def told(outputs: Sequence[SequenceOutput]) -> tuple[Any, ...]:
    logprobs = [entry for output in outputs for entry in output.logprobs or []]
    last = outputs[-1]
    scores = next((output.scores for output in outputs if output.scores is not None), None)
    scored = None if scores is None else [score.logprob for score in scores]
    return tokens_of(list(outputs)), logprobs, scored, last.finish_reason, last.error, last.num_computed


@pytest.mark.parametrize("num_blocks", [200, 18])
def test_everything_a_request_may_ask_for_is_answered_alike(
    llama: str, monkeypatch: pytest.MonkeyPatch, num_blocks: int
) -> None:
    resampled: set[str] = set()
    result = InFlightStep.result

    def result_told(launched: InFlightStep) -> StepResult:
        found = result(launched)
        resampled.update(found.resampled)
        return found

    monkeypatch.setattr(InFlightStep, "result", result_told)
    answers, preemptions = {}, {}
    for mode in ("off", "on"):
        engine = engine_of(llama, mode, num_blocks)
        answers[mode] = {name: told(outputs) for name, outputs in drain(engine, requests()).items()}
        preemptions[mode] = engine.stats.preemptions_total
        check_empty(engine)
    for name, (tokens, logprobs, scores, *end) in answers["off"].items():
        found = answers["on"][name]
        assert (found[0], found[3:]) == (tokens, tuple(end)), name
        assert [entry.top_ids for entry in found[1]] == [entry.top_ids for entry in logprobs]
        for mine, other in zip(found[1], logprobs, strict=True):
            assert mine.logprob == pytest.approx(other.logprob, abs=1e-4)
        assert found[2] == (None if scores is None else pytest.approx(scores, abs=1e-4))
    assert any(end == "stop" for *_, end, _, _ in answers["on"].values()), "no sequence has ended unforeseen"
    assert "5" in resampled, "the sampler has not looked twice"
    assert (min(preemptions.values()) > 0) == (num_blocks < 200)


def test_penalties_see_every_token_before(llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host does not know the newest one yet when it launches the step."""
    seen: list[list[int]] = []

    def sample_told(logits: torch.Tensor, inputs: Sequence[SampleInput]) -> Samples:
        for one in inputs:
            seen.append([*one.tokens, *(one.pending.tolist() if one.pending is not None else [])])
        return sample(logits, inputs)

    monkeypatch.setattr(runner, "sample", sample_told)
    asked = make_request("a", [40, 7, 3], max_tokens=8, presence_penalty=1.0)
    answer = tokens_of(drain(engine_of(llama, "on"), [asked])["a"])
    assert seen == [[40, 7, 3, *answer[:count]] for count in range(8)]


def test_the_next_step_is_launched_before_the_tokens_of_the_last_are_asked_for(
    llama: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    launch, result = Runner.launch, InFlightStep.result

    def launch_told(self: Runner, step: Step) -> InFlightStep:
        events.append("launch")
        return launch(self, step)

    def result_told(launched: InFlightStep) -> StepResult:
        events.append("result")
        return result(launched)

    monkeypatch.setattr(Runner, "launch", launch_told)
    monkeypatch.setattr(InFlightStep, "result", result_told)
    drain(engine_of(llama, "on"), [make_request("a", [5, 6], max_tokens=4)])
    assert events == ["launch", "launch", "result", "launch", "result", "launch", "result", "result"]
    events.clear()
    drain(engine_of(llama, "off"), [make_request("a", [5, 6], max_tokens=4)])
    assert events == ["launch", "result"] * 4


def test_a_poison_request_fails_alone(llama: str) -> None:
    engine = engine_of(llama, "on")
    reference = load_reference(llama)
    good = [make_request(f"good{i}", [100 + i, 200, 300]) for i in range(3)]
    outputs = drain(engine, [good[0], make_request("poison", [5, 60_000, 7]), *good[1:]])
    assert [output.finish_reason for output in outputs["poison"]] == ["error"]
    for request in good:
        assert tokens_of(outputs[request.request_id]) == reference.generate(request.token_ids, 10)
    check_empty(engine)


def test_a_step_in_which_everyone_fails_is_followed_by_others(llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(llama, "on")
    forward, calls = engine._runner._forward, [0]

    def broken_at_first(batch: RaggedBatch) -> torch.Tensor:
        calls[0] += 1
        if calls[0] <= 2:  # the step, and its row by itself
            raise RuntimeError("broken")
        return forward(batch)

    monkeypatch.setattr(engine._runner, "_forward", broken_at_first)
    outputs = drain(engine, [make_request("unlucky", [5, 6])])
    assert [output.finish_reason for output in outputs["unlucky"]] == ["error"]
    assert len(tokens_of(drain(engine, [make_request("next", [5, 6])])["next"])) == 10
    check_empty(engine)


def test_a_soft_prompt_fails_once_though_its_next_chunk_is_in_flight(
    llama: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    limits = {"max_batch_size": 8, "max_batch_tokens": 24, "max_model_len": 128}
    engine, ready = build(llama, num_blocks=40, async_scheduling="on", **limits)
    forward = engine._runner._forward

    def broken_on_soft_prompts(batch: RaggedBatch) -> torch.Tensor:
        if batch.embeddings:
            raise RuntimeError("broken")
        return forward(batch)

    monkeypatch.setattr(engine._runner, "_forward", broken_on_soft_prompts)
    path = save_prompt(make_soft_prompt("embeddings", 60, ready.model), tmp_path, "p")
    params = SamplingParams(max_tokens=3)
    ref = SoftPromptRef("7" * 64, str(path), 60)
    soft = AddRequest(request_id="soft", token_ids=[5], params=params, soft_prompt=ref)
    outputs = drain(engine, [soft, make_request("plain", [5, 6], max_tokens=30)])
    assert [output.finish_reason for output in outputs["soft"]] == ["error"]
    assert "soft prompt" in outputs["soft"][0].error
    assert tokens_of(outputs["plain"]) == tokens_of(
        drain(engine, [make_request("again", [5, 6], max_tokens=30)])["again"]
    )
    assert sum("running its rows one by one" in line for line in caplog.messages) == 1
    check_empty(engine)


def test_a_sequence_cancelled_in_flight_has_no_more_outputs(llama: str) -> None:
    engine = engine_of(llama, "on")
    for name in "ab":
        engine.handle(make_request(name, [5, 6], max_tokens=8))
    engine.step()
    engine.handle(CancelRequest(["a", "b"]))
    assert engine.has_work, "a step is in flight"
    assert engine.step().outputs == []
    assert not engine.has_work
    check_empty(engine)
