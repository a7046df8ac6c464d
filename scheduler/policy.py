"""The policy: who is admitted next, who comes first in a step, and who is preempted. All of it is decided here."""

from __future__ import annotations

import bisect
from collections.abc import Iterable

from softbatch.scheduler.sequence import Sequence


def precedence(sequence: Sequence) -> tuple[int, int]:
    """The smaller one goes first: the one of the lower `priority` number, among equals the earlier arrival.

    A sequence keeps its precedence for life. One that was preempted therefore returns before all that arrived later.
    """
    return (sequence.priority, sequence.arrival)


def insert(running: list[Sequence], sequence: Sequence) -> None:
    """Put a sequence into the running batch, which is kept in order of precedence."""
    bisect.insort(running, sequence, key=precedence)


def preemption_victim(candidates: Iterable[Sequence]) -> Sequence:
    """The sequence to preempt: the last in precedence, so that the first always makes progress."""
    return max(candidates, key=precedence)


def must_preempt(running: Iterable[Sequence]) -> bool:
    """Whether a lack of blocks calls for a preemption: not while a running sequence is sure to end with the step in
    flight, for its blocks come free after that step."""
    return not any(sequence.will_end for sequence in running)
