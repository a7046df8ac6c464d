"""What a router knows of the soft prompts that replicas hold: what each has said, and what was sent there since."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

# For so long before a replica says what it holds, it may not yet say what it was sent: that has to be loaded.
LOAD_SECONDS = 1.0
# A replica that says nothing any more holds for so long what it was sent.
FRESH_SECONDS = 5.0
# Names that one is sent within that time and did not hold; more say nothing about its room.
MOST_RECENT = 1_000


@dataclass
class _Said:
    """`at` is in Unix seconds; `room` is for how many more, as far as it knows."""

    at: float = 0.0
    held: frozenset[str] = frozenset()
    room: float = math.inf
    sent: dict[str, float] = field(default_factory=dict)  # what it did not hold, and when it was last sent


class Residency:
    """Replicas speak once a second, and many requests are routed in between: what one was sent takes its room, and is
    held there, until that replica has spoken of it. Then its own word alone counts: what is not held was evicted."""

    def __init__(self) -> None:
        self._said: dict[str, _Said] = {}

    def keep(self, keys: Collection[str]) -> None:
        """Forget replicas that are gone."""
        if len(self._said) > 2 * len(keys):
            self._said = {key: said for key, said in self._said.items() if key in keys}

    def take(self, key: str, stats: Mapping[str, Any], now: float) -> None:
        """What the replica has said last; cheap if it is the same as before."""
        said = self._said.setdefault(key, _Said())
        at = stats.get("at", 0.0)
        if at != said.at:
            said.at, said.held, said.room = at, frozenset(stats.get("held", ())), stats.get("room", math.inf)
            said.sent = {name: when for name, when in said.sent.items() if name not in said.held}
        since = max(now - FRESH_SECONDS, at - LOAD_SECONDS)
        if said.sent and min(said.sent.values()) <= since:
            said.sent = {name: when for name, when in said.sent.items() if when > since}

    def sent(self, key: str, name: str, now: float) -> None:
        said = self._said.setdefault(key, _Said())
        if name not in said.held and len(said.sent) < MOST_RECENT:
            said.sent[name] = now

    def holds(self, key: str, name: str) -> bool:
        said = self._said.get(key)
        return said is not None and (name in said.held or name in said.sent)

    def has_room(self, key: str) -> bool:
        said = self._said.get(key)
        return said is None or said.room > len(said.sent)
