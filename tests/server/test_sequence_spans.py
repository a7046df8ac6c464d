"""What happened to a sequence as spans, of sequences that go through more than the usual."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from opentelemetry.context import Context
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from softbatch.scheduler.protocol import Moment
from softbatch.server.observability.sequence_spans import make_spans

NEVER = {"started": None, "first_token": None, "last_token": None, "end_reason": None, "moments": []}
USUAL = {"request_id": "a", "submitted": 1.0, "priority": 0, "soft_prompt": None, "generated": 3}
TOKENS = {"prompt_tokens": 5, "num_cached": 0}


def spans_of(**fields: Any) -> dict[str, ReadableSpan]:
    exporter, provider = InMemorySpanExporter(), TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    active = SimpleNamespace(**{**NEVER, **USUAL, **TOKENS, **fields})
    make_spans(active, Context(), provider.get_tracer("test"), lambda at: int(at * 1000), 9.0, {})  # type: ignore[arg-type]
    return {span.name: span for span in exporter.get_finished_spans()}


def times(spans: dict[str, ReadableSpan]) -> dict[str, tuple[float, float]]:
    return {name: ((span.start_time or 0) / 1000, (span.end_time or 0) / 1000) for name, span in spans.items()}


def moment(kind: Any, at: float, since: float | None = None) -> Moment:
    return Moment("a", kind, at, since)


def test_a_preemption_is_an_event_of_where_it_happened() -> None:
    told = [moment("admitted", 2), moment("first_token", 3), moment("preempted", 4), moment("admitted", 5)]
    spans = spans_of(
        moments=[*told, moment("ended", 6)], end_reason="eos", first_token=3.1, last_token=6.1, started=2.1
    )
    assert times(spans) == {"queue": (1, 2), "prefill": (2, 3), "decode": (3, 6)}
    assert [event.name for event in spans["decode"].events] == ["preempted", "resumed"]
    assert not spans["prefill"].events
    assert (spans["decode"].attributes or {})["softbatch.finish_reason"] == "stop"


def test_a_load_that_somebody_else_began_counts_from_its_own_begin() -> None:
    spans = spans_of(moments=[moment("loaded", 4, 0.5), moment("admitted", 5)], soft_prompt="s", end_reason="cancelled")
    assert times(spans)["soft prompt load"] == (1, 4)
    assert times(spans)["prefill"] == (5, 9), "cut short with its request"


@pytest.mark.parametrize("reason", ["cancelled", "expired", None])
def test_who_leaves_the_queue_has_been_in_the_queue_alone(reason: str | None) -> None:
    assert times(spans_of(end_reason=reason)) == {"queue": (1, 9)}


def test_a_stop_string_ends_with_the_token_that_completed_it() -> None:
    told = [moment("admitted", 2), moment("first_token", 3)]
    spans = spans_of(moments=told, end_reason="stop", first_token=3.1, last_token=5.0)
    assert times(spans)["decode"] == (3, 5)


def test_who_was_never_submitted_has_none() -> None:
    assert spans_of(submitted=None) == {}
