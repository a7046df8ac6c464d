"""How many replicas Serve should have: by unfinished requests, and by what they wait for their first token.

Serve pickles this file whole, so it imports nothing of ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# What replicas say of every interval: how many got their first token or still wait for it, and how long that took
# them together.
FIRST_TOKENS, FIRST_TOKEN_SECONDS = "first_tokens", "first_token_seconds"
# At once, replicas are at most so many times as many.
MOST_GROWTH = 2.0
# With fewer replicas all wait longer, so none goes before they wait for less than this share of the aim.
CALM = 0.5


class ScalingPolicy:
    """Serve makes one for each deployment; bounds and delays are Serve's."""

    def __init__(self, first_token_seconds: float) -> None:
        self._aim = first_token_seconds

    def __call__(self, context: Any) -> tuple[float, dict[str, Any]]:
        running = context.current_num_replicas
        if not running:
            return context.target_num_replicas, {}
        by_requests = context.total_num_requests / context.config.get_target_ongoing_requests()
        return max(by_requests, self._by_first_token(running, context.aggregated_metrics or {})), {}

    def _by_first_token(self, running: int, said: Mapping[str, Mapping[Any, float]]) -> float:
        count = sum(said.get(FIRST_TOKENS, {}).values())
        if count <= 0:
            return 0
        seconds = sum(said.get(FIRST_TOKEN_SECONDS, {}).values()) / count
        if seconds > self._aim:
            return running * min(MOST_GROWTH, seconds / self._aim)
        return running if seconds > CALM * self._aim else 0
