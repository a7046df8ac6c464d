"""Requests whose time is over: what they get, and that they leave the engine; with a scheduler and no model."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from softbatch.scheduler.protocol import SequenceOutput
from softbatch.server.request_failures import DeadlineExceeded
from softbatch.server.requests.active_request import ActiveRequest
from softbatch.server.requests.admission import Admission, AdmissionLimits
from softbatch.server.requests.deadline import Deadline
from tests.support.fake_runner import next_token
from tests.support.in_process_engine import InProcessEngine, active_request


def in_a_loop(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    def run() -> None:
        asyncio.run(test())

    return run


def in_an_hour() -> Deadline:
    return Deadline(time.monotonic() + 3600, 3600)


def ring(engine: InProcessEngine, request: ActiveRequest) -> None:
    """Its deadline is now."""
    engine.client._expire(request)


async def outcome(engine: InProcessEngine, request: ActiveRequest) -> tuple[list[int], str | None]:
    tokens: list[int] = []
    last: SequenceOutput | None = None
    async for batch in engine.client.outputs(request):
        for last in batch:
            tokens += last.token_ids
    return tokens, last.finish_reason if last else None


@in_a_loop
async def test_who_still_waits_fails_and_never_runs() -> None:
    engine = InProcessEngine(slots=1)
    busy, late = active_request("busy"), active_request("late", in_an_hour())
    engine.client.submit(busy)
    engine.client.submit(late)
    engine.step()
    ring(engine, late)
    assert len(engine.scheduler.waiting) == 0
    with pytest.raises(DeadlineExceeded, match="3600 s") as error:
        await outcome(engine, late)
    assert error.value.code == "deadline_exceeded"
    while engine.client.active:
        engine.step()
    assert engine.computed == {"busy"}
    assert (await outcome(engine, busy))[1] == "length"
    assert (engine.finished("expired"), engine.finished("length")) == (1, 1)


@in_a_loop
async def test_who_runs_ends_with_its_output_and_frees_the_slot_for_the_next_step() -> None:
    engine = InProcessEngine(slots=1)
    late, heir = active_request("late", in_an_hour()), active_request("heir")
    engine.client.submit(late)
    engine.client.submit(heir)
    for _ in range(4):
        assert engine.step() == {"late"}
    ring(engine, late)
    assert engine.step() == {"heir"}
    tokens, reason = await outcome(engine, late)
    assert (tokens, reason) == (late.received, "timeout")
    assert len(tokens) == 4
    assert engine.finished("timeout") == 1
    assert late.alarm is not None
    assert late.alarm.cancelled()


@in_a_loop
async def test_time_runs_on_while_the_engine_is_away() -> None:
    engine = InProcessEngine()
    begun, new = active_request("begun", in_an_hour()), active_request("new", in_an_hour())
    engine.client.submit(begun)
    engine.step()
    engine.die()
    engine.client.submit(new)
    ring(engine, begun)
    ring(engine, new)
    assert await outcome(engine, begun) == (begun.received, "timeout")
    with pytest.raises(DeadlineExceeded):
        await outcome(engine, new)
    engine.revive()
    assert not engine.scheduler.has_work


@in_a_loop
async def test_of_several_choices_those_without_output_end_empty_if_another_has_some() -> None:
    engine, shared = InProcessEngine(slots=1), in_an_hour()
    first, second = active_request("first", shared), active_request("second", shared)
    for request in (first, second):
        engine.client.submit(request)
    engine.step()
    for request in (first, second):
        ring(engine, request)
    assert await outcome(engine, first) == (first.received, "timeout")
    assert await outcome(engine, second) == ([], "timeout")


@in_a_loop
async def test_a_request_that_was_prepared_for_too_long_is_not_sent() -> None:
    engine = InProcessEngine()
    late = active_request("late", Deadline(time.monotonic() - 0.1, 0.5))
    engine.client.submit(late)
    assert not engine.scheduler.has_work
    with pytest.raises(DeadlineExceeded):
        await outcome(engine, late)


@in_a_loop
async def test_the_alarm_rings_at_the_deadline_alone() -> None:
    engine = InProcessEngine()
    late = active_request("late", Deadline(time.monotonic() + 0.05, 0.05))
    other = active_request("other", in_an_hour())
    engine.client.submit(late)
    engine.client.submit(other)
    with pytest.raises(DeadlineExceeded):
        await outcome(engine, late)
    assert time.monotonic() >= late.deadline.at - 0.01  # type: ignore[union-attr]
    assert list(engine.client.active) == ["other"]


@in_a_loop
async def test_a_request_has_its_own_time_or_the_servers() -> None:
    engine = InProcessEngine()
    for default, own, expected in ((None, None, None), (None, 2.0, 2.0), (5.0, None, 5.0), (5.0, 9.0, 9.0)):
        limits = AdmissionLimits(slots=1, max_waiting=1, request_timeout=default)
        admission = Admission(engine.client, None, engine.metrics, limits)  # type: ignore[arg-type]
        with admission.reserve(1, own) as places:
            request = places.prepare([1], active_request("any").add.params, None, route="")
        if expected is None:
            assert request.deadline is None
        else:
            assert request.deadline is not None
            assert request.deadline.seconds == expected
            assert 0 < request.deadline.at - time.monotonic() <= expected


EVENTS = st.lists(st.sampled_from(["add", "step", "step", "ring", "ring", "die", "revive"]), max_size=60)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(EVENTS, st.randoms(use_true_random=False))
def test_whenever_it_rings_each_request_ends_once_with_a_part_of_its_output(events, random):
    async def run() -> None:
        engine, requests, rung = InProcessEngine(), [], set()
        for event in events:
            if event == "add":
                deadline = requests[-1].deadline if requests and random.random() < 0.3 else in_an_hour()
                requests.append(active_request(f"r{len(requests)}", deadline, max_tokens=random.randint(1, 9)))
                engine.client.submit(requests[-1])
            elif event == "step" and engine.ready:
                engine.step()
            elif event == "ring" and requests:
                request = random.choice(requests)
                if request.request_id in engine.client.active:
                    rung.add(request)
                ring(engine, request)
            elif event == "die" and engine.ready:
                engine.die()
            elif event == "revive" and not engine.ready:
                engine.revive()
        if not engine.ready:
            engine.revive()
        for _ in range(500):
            engine.step()
        assert not engine.client.active
        assert not engine.scheduler.has_work
        for request in requests:
            whole = [1, 2, 3]
            while len(whole) < 3 + request.max_tokens:
                whole.append(next_token(whole))
            try:
                tokens, reason = await outcome(engine, request)
            except DeadlineExceeded:
                assert request in rung
                assert not request.received
                continue
            if reason == "timeout":
                assert request in rung
                assert tokens == whole[3 : 3 + len(tokens)]
                assert len(tokens) < request.max_tokens
            else:
                assert tokens == whole[3:]

    asyncio.run(run())
