"""Whose a request is, and who is turned away; with a scheduler and no model."""

from __future__ import annotations

import contextvars
from typing import Any

from softbatch.scheduler.protocol import SamplingParams
from softbatch.server.observability.request_record import RequestRecord, begin
from softbatch.server.requests.active_request import ActiveRequest
from softbatch.server.requests.admission import Admission
from tests.support.in_process_engine import InProcessEngine

PARAMS = SamplingParams(max_tokens=5, ignore_eos=True)


def admission_of(engine: InProcessEngine, **limits: Any) -> Admission:
    limits = {"slots": engine.slots, "max_waiting": 100} | limits
    return Admission(engine.client, None, engine.metrics, **limits)  # type: ignore[arg-type]


def ask(admission: Admission, user: str = "", tokens: int = 3) -> ActiveRequest:
    """Raises QueueFull."""
    with admission.reserve(1) as places:
        request = places.prepare([1] * tokens, PARAMS, None, route="", user=user)
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
