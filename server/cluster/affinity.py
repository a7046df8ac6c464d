"""Which replica a request should go to: one that holds what it needs, unless that has too much to do."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class LoadBound:
    """A replica has too much to do if it has more unfinished requests than this, and so many times the mean."""

    requests: int
    share: float


# What a miss costs is worth some waiting: a soft prompt has to be read, of a prefix some tokens are computed again.
SOFT_PROMPT_BOUND = LoadBound(8, 1.5)
PREFIX_BOUND = LoadBound(4, 1.25)


@dataclass(frozen=True)
class ReplicaLoad:
    """A replica: its requests that are not finished, how much it holds of what is asked for, 0 if nothing, and whether
    it could hold that without losing something else."""

    key: str
    outstanding: int
    match: int = 0
    has_room: bool = True


def ranked(name: str, candidates: Sequence[ReplicaLoad], bound: LoadBound | None) -> list[list[str]]:
    """Groups of keys, best first; within a group the least busy is to be taken.

    Those that hold the most come first. Where none holds anything, the name has an order of its own among the replicas,
    the same for whoever asks, and those with room come before those that would have to lose something. Replicas that
    have too much to do come last, so what is asked for very often spreads. Without a bound the others cannot serve it
    at all, so load says nothing.
    """
    mean = sum(candidate.outstanding for candidate in candidates) / max(1, len(candidates))
    most = math.inf if bound is None else max(bound.requests, bound.share * mean)
    order = sorted(candidates, key=lambda candidate: _draw(name, candidate.key))
    free = [candidate for candidate in order if candidate.outstanding <= most]
    busy = [candidate for candidate in order if candidate.outstanding > most]
    matches = sorted({candidate.match for candidate in free if candidate.match}, reverse=True)
    others = [candidate for candidate in free if not candidate.match]
    groups = [
        *([candidate.key for candidate in free if candidate.match == match] for match in matches),
        *([other.key] for other in others if other.has_room),
        *([other.key] for other in others if not other.has_room),
        [candidate.key for candidate in busy],
    ]
    return [group for group in groups if group]


def _draw(name: str, key: str) -> bytes:
    return hashlib.blake2b(f"{name}\0{key}".encode(), digest_size=8).digest()
