"""Which replica a request should go to: one that holds its soft prompt, unless that has too much to do."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

# A replica has too much to do if it has more requests than this, and so many times the mean.
BUSY_REQUESTS = 8
BUSY_SHARE = 1.5


@dataclass(frozen=True)
class ReplicaLoad:
    """A replica: its requests that are not finished, whether it holds the soft prompt, and whether it could hold one
    more without losing another."""

    key: str
    outstanding: int
    holds: bool = False
    has_room: bool = True


def ranked(name: str, candidates: Sequence[ReplicaLoad], *, only_holders: bool = False) -> list[list[str]]:
    """Groups of keys, best first; within a group the least busy is to be taken.

    Those that hold `name` come first. Where none does, the name has an order of its own among the replicas, the same
    for whoever asks, and those with room come before those that would have to lose another soft prompt. Replicas that
    have too much to do come last, so a name that is asked for very often spreads. With `only_holders` the others cannot
    serve it at all, so load says nothing.
    """
    mean = sum(candidate.outstanding for candidate in candidates) / max(1, len(candidates))
    most = math.inf if only_holders else max(BUSY_REQUESTS, BUSY_SHARE * mean)
    order = sorted(candidates, key=lambda candidate: _draw(name, candidate.key))
    free = [candidate for candidate in order if candidate.outstanding <= most]
    busy = [candidate for candidate in order if candidate.outstanding > most]
    holding = [candidate.key for candidate in free if candidate.holds]
    others = [candidate for candidate in free if not candidate.holds]
    groups = [
        holding,
        *([other.key] for other in others if other.has_room),
        *([other.key] for other in others if not other.has_room),
        [candidate.key for candidate in busy],
    ]
    return [group for group in groups if group]


def _draw(name: str, key: str) -> bytes:
    return hashlib.blake2b(f"{name}\0{key}".encode(), digest_size=8).digest()
