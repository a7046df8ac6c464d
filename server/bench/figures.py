"""From exchanges to figures: percentiles, rates, goodput under a stated objective."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from softbatch.server.bench.client import Exchange
from softbatch.server.bench.load import Window


@dataclass(frozen=True)
class Objective:
    """The service level that a request must keep to count as good; seconds."""

    first_token: float = 2.0
    per_token: float = 0.2

    def is_met(self, exchange: Exchange) -> bool:
        ttft, tpot = first_token_seconds(exchange), seconds_per_token(exchange)
        return (ttft is not None and ttft <= self.first_token) and (tpot is None or tpot <= self.per_token)


@dataclass(frozen=True)
class Spread:
    """Milliseconds."""

    p50: float
    p99: float
    mean: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Spread | None:
        if not seconds:
            return None
        milliseconds = [1000 * value for value in seconds]
        return cls(percentile(milliseconds, 50), percentile(milliseconds, 99), sum(milliseconds) / len(milliseconds))


@dataclass(frozen=True)
class Figures:
    """What one run showed. Requests that were cut off at the window's end count in `output_tokens_per_second` alone."""

    seconds: float
    finished: int
    failed: int
    cut_off: int
    wrong_length: int
    requests_per_second: float
    output_tokens_per_second: float
    goodput: float
    objective: Objective
    first_token_ms: Spread | None
    per_token_ms: Spread | None
    whole_ms: Spread | None
    errors: dict[str, int]


def figures_of(window: Window, objective: Objective, *, by_events: bool) -> Figures:
    """`by_events`: tokens per second come from the events within the window, at the finished requests' tokens per
    event; otherwise from the finished requests alone, which is exact when all were waited for."""
    finished = [e for e in window.exchanges if e.error is None]
    seconds = max(window.seconds, 1e-9)
    tokens = float(sum(e.tokens or 0 for e in finished))
    if by_events:
        events = sum(e.events for e in finished)
        tokens = window.events * (tokens / events if events else 1.0)
    return Figures(
        seconds=window.seconds,
        finished=len(finished),
        failed=len(window.exchanges) - len(finished),
        cut_off=window.cut_off,
        wrong_length=sum(1 for e in finished if e.tokens != e.max_tokens),
        requests_per_second=len(finished) / seconds,
        output_tokens_per_second=tokens / seconds,
        goodput=sum(1 for e in finished if objective.is_met(e)) / seconds,
        objective=objective,
        first_token_ms=_spread(finished, first_token_seconds),
        per_token_ms=_spread(finished, seconds_per_token),
        whole_ms=_spread(finished, whole_seconds),
        errors=dict(Counter(e.error for e in window.exchanges if e.error is not None).most_common(5)),
    )


def first_token_seconds(exchange: Exchange) -> float | None:
    return None if exchange.first is None else exchange.first - exchange.asked


def seconds_per_token(exchange: Exchange) -> float | None:
    """Between the first token and the last, for each token after the first."""
    if exchange.first is None or exchange.last is None or (exchange.tokens or 0) < 2:
        return None
    return (exchange.last - exchange.first) / ((exchange.tokens or 0) - 1)


def whole_seconds(exchange: Exchange) -> float | None:
    return None if exchange.ended is None else exchange.ended - exchange.asked


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear between the closest ranks, as numpy has it by default. Raises ValueError without values."""
    if not values:
        raise ValueError("no values")
    ordered = sorted(values)
    rank = (len(ordered) - 1) * percent / 100
    low, high = math.floor(rank), math.ceil(rank)
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)


def _spread(exchanges: Sequence[Exchange], measure: Callable[[Exchange], float | None]) -> Spread | None:
    return Spread.of([value for value in map(measure, exchanges) if value is not None])
