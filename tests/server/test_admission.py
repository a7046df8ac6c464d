"""Whose a request is, and who is turned away; with a scheduler and no model."""

from __future__ import annotations

import contextvars
from typing import Any

import pytest

from softbatch.scheduler.protocol import SamplingParams
from softbatch.server.observability.request_record import RequestRecord, begin
from softbatch.server.request_failures import QueueFull
from softbatch.server.requests.active_request import ActiveRequest
from softbatch.server.requests.admission import Admission, AdmissionLimits
from tests.support.in_process_engine import InProcessEngine

PARAMS = SamplingParams(max_tokens=5, ignore_eos=True)


def admission_of(engine: InProcessEngine, **limits: Any) -> Admission:
    own = AdmissionLimits(**({"slots": engine.slots, "max_waiting": 100} | limits))
    return Admission(engine.client, None, engine.metrics, own)  # type: ignore[arg-type]


def ask(admission: Admission, user: str = "", tokens: int = 3) -> ActiveRequest:
    """Raises QueueFull."""
    with admission.reserve(1, user=user) as places:
        request = places.prepare([1] * tokens, PARAMS, None, route="")
    admission.submit(request)
    return request


def test_requests_belong_to_a_key_or_else_to_a_user_whose_name_is_not_kept() -> None:
    contextvars.copy_context().run(_ask_as_several)


def _ask_as_several() -> None:
    admission = admission_of(InProcessEngine())
    begin(RequestRecord("", owner="c0ffee"))
    assert ask(admission, "ann").add.owner == ask(admission, "bob").add.owner == "c0ffee"
    begin(RequestRecord(""))
    ann, bob = ask(admission, "ann").add.owner, ask(admission, "bob").add.owner
    assert len({ann, bob, "c0ffee"}) == 3
    assert "ann" not in ann
    assert ask(admission, "ann").add.owner == ann
    assert ask(admission).add.owner == ""


def rejected(engine: InProcessEngine, reason: str) -> float | None:
    return engine.metrics.registry.get_sample_value("softbatch_requests_rejected_total", {"reason": reason})


def test_waiting_prompt_tokens_are_bounded_and_what_runs_does_not_count() -> None:
    engine = InProcessEngine(slots=2)
    admission = admission_of(engine, max_waiting_tokens=20)
    for _ in range(2):
        ask(admission, tokens=15)  # There are slots for these.
    ask(admission, tokens=30)  # Nobody waits yet: otherwise it could never be served.
    with pytest.raises(QueueFull, match="20 prompt tokens"):
        ask(admission, tokens=1)
    engine.step()
    with pytest.raises(QueueFull):
        ask(admission, tokens=1)
    while engine.client.active:
        engine.step()
    for tokens in (15, 15, 12, 8):
        ask(admission, tokens=tokens)
    with pytest.raises(QueueFull) as error:
        ask(admission, tokens=1)
    assert error.value.code == "rate_limit_exceeded"
    assert error.value.retry_after is not None
    assert 1 <= error.value.retry_after <= 60
    assert rejected(engine, "queue_tokens") == 3


def test_what_has_just_been_counted_to_be_too_much_gives_its_place_back() -> None:
    engine = InProcessEngine(slots=1)
    admission = admission_of(engine, max_waiting_tokens=20, max_waiting=2)
    for tokens in (5, 12):
        ask(admission, tokens=tokens)
    for _ in range(5):
        with pytest.raises(QueueFull, match="prompt tokens"):
            ask(admission, tokens=9)
    ask(admission, tokens=8)
    with pytest.raises(QueueFull, match="2 requests"):
        ask(admission)


def test_one_user_cannot_fill_the_queue_that_others_wait_in() -> None:
    engine = InProcessEngine(slots=2)
    admission = admission_of(engine, max_waiting_per_owner=3)
    for _ in range(5):  # Two of them need not wait.
        ask(admission, "heavy")
    with pytest.raises(QueueFull, match="3 requests may wait"):
        ask(admission, "heavy")
    engine.step()
    with pytest.raises(QueueFull):
        ask(admission, "heavy")
    for _ in range(3):
        ask(admission, "light")
    with pytest.raises(QueueFull):
        ask(admission, "light")
    while engine.client.active:
        engine.step()
    ask(admission, "heavy")
    assert rejected(engine, "key_queue_full") == 3


def test_who_leaves_the_queue_unserved_does_not_make_the_server_look_fast() -> None:
    engine = InProcessEngine(slots=1)
    admission = admission_of(engine)
    ask(admission)
    engine.step()
    waiting = [ask(admission) for _ in range(50)]
    for request in waiting:
        admission.cancel(request, "cancelled")
    ask(admission)
    assert engine.client.seconds_to_drain == 1.0


def test_the_background_takes_no_places_of_others_and_counts_to_no_latency() -> None:
    contextvars.copy_context().run(_ask_beside_the_background)


def _ask_beside_the_background() -> None:
    engine = InProcessEngine(slots=2)
    begin(RequestRecord("", is_background=True))
    admission = admission_of(engine, request_timeout=60.0)
    behind = [ask(admission, tokens=8) for _ in range(2)]
    with pytest.raises(QueueFull, match="background"):
        ask(admission)
    assert [(each.is_background, each.deadline) for each in behind] == [(True, None)] * 2
    engine.step()
    assert [each.state for each in behind] == ["running"] * 2
    begin(RequestRecord(""))
    admission = admission_of(engine, max_waiting=1, max_waiting_tokens=30, max_waiting_per_owner=1)
    others = [ask(admission, tokens=8) for _ in range(3)]
    with pytest.raises(QueueFull, match="1 requests"):
        ask(admission)
    engine.step()
    assert [other.state for other in others] == ["running", "running", "waiting"]
    assert [each.state for each in behind] == ["waiting"] * 2
    while engine.client.active:
        engine.step()
    assert engine.client.num_background == 0
    assert [each.generated for each in behind] == [5, 5]
    counted = engine.metrics.registry.get_sample_value
    assert counted("softbatch_time_to_first_token_seconds_count") == counted("softbatch_queue_time_seconds_count") == 3
    assert counted("softbatch_e2e_request_latency_seconds_count") == 3
    assert counted("softbatch_requests_finished_total", {"reason": "length"}) == 5


def test_whoever_needs_many_places_of_the_background_gets_them() -> None:
    contextvars.copy_context().run(_ask_for_many_places)


def _ask_for_many_places() -> None:
    engine = InProcessEngine(slots=4)
    begin(RequestRecord("", is_background=True))
    admission = admission_of(engine)
    small = [ask(admission) for _ in range(3)]
    with pytest.raises(QueueFull, match="background"), admission.reserve(3):
        pass
    with pytest.raises(QueueFull, match="background"):
        ask(admission)  # there is a place, but the other would never find three
    for request in small:
        admission.cancel(request, "cancelled")
    with admission.reserve(3):
        ask(admission)
        with pytest.raises(QueueFull):
            ask(admission)
