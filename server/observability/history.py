"""The last ten minutes as figures, read from the metrics every two seconds: enough for a plot without a database."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import dropwhile

from prometheus_client.metrics import MetricWrapperBase

from softbatch.server.observability.metrics import Metrics

SECONDS_BETWEEN_SAMPLES = 2.0
MAX_SAMPLES = 300


@dataclass(frozen=True)
class HistorySample:
    """`at` is in Unix seconds. `first_token_seconds` is a mean, None if nobody got a first token."""

    at: float
    running: int
    waiting: int
    tokens_per_second: float
    first_token_seconds: float | None
    kv_usage: float
    preemptions: int
    rejections: int


class History:
    """Owns the samples. Looks at the metrics alone, which the engine knows nothing of."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._samples: deque[HistorySample] = deque(maxlen=MAX_SAMPLES)
        self._taken = time.monotonic()
        # Added to a clock that never goes back, so that `since` misses nothing when the machine's is set.
        self._epoch = time.time() - self._taken
        self._totals = self._read()

    def take(self) -> None:
        """One sample more, of what has happened since the last."""
        metrics, before, now = self._metrics, self._totals, time.monotonic()
        self._totals = self._read()
        new = {name: self._totals[name] - before[name] for name in before}
        seconds, self._taken = max(now - self._taken, 1e-9), now
        self._samples.append(
            HistorySample(
                at=round(self._epoch + now, 3),
                running=int(_sum(metrics.requests_running)),
                waiting=int(_sum(metrics.requests_waiting)),
                tokens_per_second=round(new["tokens"] / seconds, 2),
                first_token_seconds=round(new["first_seconds"] / new["firsts"], 4) if new["firsts"] else None,
                kv_usage=round(_sum(metrics.kv_usage), 4),
                preemptions=int(new["preemptions"]),
                rejections=int(new["rejections"]),
            )
        )

    def since(self, at: float) -> list[HistorySample]:
        """The samples that were taken later."""
        return list(dropwhile(lambda sample: sample.at <= at, self._samples))

    def _read(self) -> dict[str, float]:
        metrics = self._metrics
        return {
            "tokens": _sum(metrics.generation_tokens, "_total"),
            "firsts": _sum(metrics.first_token, "_count"),
            "first_seconds": _sum(metrics.first_token, "_sum"),
            "preemptions": _sum(metrics.preemptions, "_total"),
            "rejections": _sum(metrics.requests_rejected, "_total"),
        }


def _sum(metric: MetricWrapperBase, ending: str = "") -> float:
    """Over all labels."""
    return sum(value for name, value in _values(metric) if name.endswith(ending))


def _values(metric: MetricWrapperBase) -> Iterator[tuple[str, float]]:
    for family in metric.collect():
        for sample in family.samples:
            yield sample.name, sample.value
