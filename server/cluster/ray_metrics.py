"""The server's metrics as Ray's own, which Ray gives with the replica's name and sums over all of them."""

from __future__ import annotations

import asyncio
from typing import Any

from prometheus_client import CollectorRegistry
from ray.serve import metrics

PERIOD_SECONDS = 2.0
# Of a histogram, its sum and its count are enough for a mean; its buckets are not mirrored.
_COUNTING = ("_total", "_sum", "_count")


async def mirror_metrics(registry: CollectorRegistry) -> None:
    """Until it is cancelled."""
    mirror = _Mirror()
    while True:
        mirror.take(registry)
        await asyncio.sleep(PERIOD_SECONDS)


class _Mirror:
    def __init__(self) -> None:
        self._made: dict[str, Any] = {}
        self._seen: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}

    def take(self, registry: CollectorRegistry) -> None:
        for family in registry.collect():
            for sample in family.samples:
                if sample.name.endswith(("_bucket", "_created")):
                    continue
                self._put(sample.name, family.documentation, dict(sample.labels), sample.value, family.type)

    def _put(self, name: str, text: str, labels: dict[str, str], value: float, kind: str) -> None:
        counts = kind in ("counter", "histogram") and name.endswith(_COUNTING)
        metric = self._made.get(name)
        if metric is None:
            make = metrics.Counter if counts else metrics.Gauge
            metric = self._made[name] = make(name, description=text, tag_keys=tuple(labels))
        if not counts:
            metric.set(value, tags=labels)
            return
        key = (name, tuple(sorted(labels.items())))
        if value > self._seen.get(key, 0.0):
            metric.inc(value - self._seen.get(key, 0.0), tags=labels)
            self._seen[key] = value
