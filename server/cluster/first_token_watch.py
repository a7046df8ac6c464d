"""What requests wait for their first token, told again and again to whoever scales."""

from __future__ import annotations

import time

from softbatch.server.cluster.scaling_policy import FIRST_TOKEN_SECONDS, FIRST_TOKENS
from softbatch.server.observability.metrics import Metrics
from softbatch.server.requests.engine_client import EngineClient


class FirstTokenWatch:
    """Counts those who got their first token since the last look, and those who have waited for it since before that:
    a server on which nobody gets any is the slowest of all. Lines of batches do not count, as nobody waits for them."""

    def __init__(self, metrics: Metrics, engine: EngineClient) -> None:
        self._metrics, self._engine = metrics, engine
        self._totals = (0.0, 0.0)
        self._looked = time.monotonic()

    def take(self) -> dict[str, float]:
        """Since the last call."""
        now, (count, seconds) = time.monotonic(), self._read()
        new_count, new_seconds = count - self._totals[0], seconds - self._totals[1]
        for request in self._engine.without_first_token():
            if request.arrived < self._looked and not request.is_background:
                new_count += 1
                new_seconds += now - request.arrived
        self._totals, self._looked = (count, seconds), now
        return {FIRST_TOKENS: new_count, FIRST_TOKEN_SECONDS: new_seconds}

    def _read(self) -> tuple[float, float]:
        found = {
            sample.name.rpartition("_")[2]: sample.value
            for family in self._metrics.first_token.collect()
            for sample in family.samples
        }
        return found["count"], found["sum"]
