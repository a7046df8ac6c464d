"""What happened to one sequence, as spans below its request's, made at its end from times that were noted meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from opentelemetry.context import Context
from opentelemetry.trace import Tracer

from softbatch.scheduler.protocol import Moment
from softbatch.server.observability.gen_ai import Value, finish_reason
from softbatch.server.observability.request_record import Started

Clock = Callable[[float], int]


def make_spans(
    active: Started, parent: Context, tracer: Tracer, clock: Clock, ended: float, common: Mapping[str, Value]
) -> None:
    """Queue, load of the soft prompt, prefill and decode. `clock` makes Unix nanoseconds of monotonic seconds; what was
    never reached has no span, and what was cut short ends at `ended`."""
    submitted = active.submitted
    if submitted is None:
        return
    first_of: dict[str, Moment] = {}
    for moment in active.moments:
        first_of.setdefault(moment.kind, moment)
    admitted = _at(first_of.get("admitted"), active.started)
    first_token = _at(first_of.get("first_token"), active.first_token)
    end = _at(first_of.get("ended"), active.last_token if active.end_reason in ("stop", "timeout") else None)
    end = ended if end is None else end

    def span(name: str, since: float, until: float, attributes: Mapping[str, Value]) -> None:
        since = max(since, submitted)
        until = max(since, until)
        made = tracer.start_span(name, parent, attributes={**common, **attributes}, start_time=clock(since))
        for moment in active.moments:
            if moment.kind in _EVENTS and since <= moment.at <= until and moment is not first_of.get("admitted"):
                made.add_event(_EVENTS[moment.kind], timestamp=clock(moment.at))
        made.end(clock(until))

    span("queue", submitted, end if admitted is None else admitted, {"softbatch.priority": active.priority})
    if load := first_of.get("loaded"):
        span(
            "soft prompt load", load.since or load.at, load.at, {"softbatch.soft_prompt.name": active.soft_prompt or ""}
        )
    if admitted is None:
        return
    computed: dict[str, Value] = {
        "softbatch.prompt_tokens": active.prompt_tokens,
        "softbatch.cached_tokens": active.num_cached,
    }
    span("prefill", admitted, end if first_token is None else first_token, computed)
    if first_token is not None:
        reason = finish_reason(active)
        span(
            "decode", first_token, end, {"softbatch.output_tokens": active.generated, "softbatch.finish_reason": reason}
        )


_EVENTS = {"preempted": "preempted", "admitted": "resumed"}


def _at(moment: Moment | None, otherwise: float | None) -> float | None:
    return otherwise if moment is None else moment.at
