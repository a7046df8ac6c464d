"""The policy: who comes first, and who is preempted. Among those who wait, `fair_order.py` first looks at shares."""

from __future__ import annotations

import bisect
from collections.abc import Iterable

from softbatch.scheduler.protocol import MAX_PRIORITY
from softbatch.scheduler.sequence import Sequence

# A prompt may be overtaken by shorter ones that came later, until so many times its own tokens have passed it.
OVERTAKING = 16


def turn(prompts_begun: int, prompt_tokens: int) -> int:
    """When a sequence that arrives now has its turn, on the clock that `prompts_begun`, the tokens of all prompts begun
    so far, is.

    A short prompt has its turn sooner than a long one that waits or is being computed, and one that has waited long
    enough goes before all that arrive. Lengths are told apart by powers of two alone: requests behind one context
    stay in the order of arrival, and find cached what the one before has computed.
    """
    return prompts_begun + OVERTAKING * (1 << prompt_tokens.bit_length())


def precedence(sequence: Sequence) -> tuple[int, int, int]:
    """The smaller one goes first: the one of the lower `priority` number, among equals the earlier turn, then the
    earlier arrival.

    A sequence keeps its precedence for life. One that was preempted therefore returns to its old place.
    """
    return (sequence.priority, sequence.turn, sequence.arrival)


def is_background(sequence: Sequence) -> bool:
    """Whether nobody waits for it: it runs when others leave room, and leaves the batch for them."""
    return sequence.priority > MAX_PRIORITY


def insert(running: list[Sequence], sequence: Sequence) -> None:
    """Put a sequence into the running batch, which is kept in order of precedence."""
    bisect.insort(running, sequence, key=precedence)


def preemption_victim(candidates: Iterable[Sequence]) -> Sequence:
    """The sequence to preempt: the last in precedence, so that the first always makes progress."""
    return max(candidates, key=precedence)


def slot_giver(newcomer: Sequence, running: Iterable[Sequence]) -> Sequence | None:
    """The sequence that leaves its slot to an owner who has none: the last in precedence of the owner who has the most
    for its weight, if that one keeps another. None: the newcomer waits for a slot as all others do."""
    slots: dict[str, int] = {}
    for sequence in running:
        if sequence.owner == newcomer.owner:
            return None
        slots[sequence.owner] = slots.get(sequence.owner, 0) + 1
    givers = [s for s in running if slots[s.owner] > 1 and s.priority >= newcomer.priority]
    return max(givers, key=lambda s: (slots[s.owner] / s.weight, precedence(s)), default=None)


def must_preempt(running: Iterable[Sequence]) -> bool:
    """Whether a lack of blocks calls for a preemption: not while a running sequence is sure to end with the step in
    flight, for its blocks come free after that step."""
    return not any(sequence.will_end for sequence in running)
