"""Which sequences decode in a step if several owners have some: a light owner keeps its part of the pace."""

from __future__ import annotations

from collections.abc import Collection

from softbatch.scheduler.sequence import Sequence

# Steps that the cost of the next one is told from, the latest ones most; with fewer, or all alike, it is not known.
_REMEMBERED = 64
_LEAST_STEPS = 8
_LEAST_VARIANCE = 1.0
# Of what an owner may be slowed down by decoding; the rest is for its wait for a slot and for others' prefills.
_PART = 0.85
# Until the cost is known, one step in so many takes half of the rows.
_TRIAL = 16


class DecodeCost:
    """What a step that only decodes takes, as a straight line over its rows; learnt from the steps."""

    def __init__(self) -> None:
        self._steps = self._rows = self._seconds = self._rows_rows = self._rows_seconds = 0.0

    def observe(self, rows: int, seconds: float) -> None:
        keep = 1 - 1 / _REMEMBERED
        self._steps = keep * self._steps + 1
        self._rows = keep * self._rows + rows
        self._seconds = keep * self._seconds + seconds
        self._rows_rows = keep * self._rows_rows + rows * rows
        self._rows_seconds = keep * self._rows_seconds + rows * seconds

    def line(self) -> tuple[float, float] | None:
        """Seconds of every step, and of each row; None if that is not known."""
        if self._steps < _LEAST_STEPS:
            return None
        rows, seconds = self._rows / self._steps, self._seconds / self._steps
        variance = self._rows_rows / self._steps - rows * rows
        if variance < _LEAST_VARIANCE:
            return None
        each = (self._rows_seconds / self._steps - rows * seconds) / variance
        return max(0.0, seconds - each * rows), max(0.0, each)


def who_decodes(decoding: Collection[Sequence], cost: DecodeCost, step: int) -> Collection[Sequence] | None:
    """Those of the sequences that the step of that number takes; None: all.

    With the whole machine to itself, an owner's step would take as long as its own rows do. Beside others of the same
    weight it may take as many times that as there are owners, and by weights accordingly: no owner's tokens come any
    slower. If all rows would take longer, owners with many take turns with theirs. Rows of different priorities do not
    share. On a machine whose steps take as long for many rows as for few, nobody ever waits.
    """
    owners: dict[str, list[Sequence]] = {}
    for sequence in decoding:
        owners.setdefault(sequence.owner, []).append(sequence)
    if len(owners) < 2 or len({sequence.priority for sequence in decoding}) > 1:
        return None
    line = cost.line()
    if line is None:
        halves = [own[: -(-len(own) // 2)] for own in owners.values()] if step % _TRIAL == 0 else []
        return {sequence for half in halves for sequence in half} or None
    fixed, each = line
    if each == 0:
        return None
    weight = sum(own[0].weight for own in owners.values())
    longest = min(_longest(own, fixed, each, weight, len(owners) - 1) for own in owners.values())
    room = max(len(owners), int((longest - fixed) / each + 1e-6))
    if room >= len(decoding):
        return None
    chosen: set[Sequence] = set()
    for own in sorted(owners.values(), key=lambda own: len(own) / own[0].weight):
        count = min(len(own), max(1, int(room * own[0].weight / weight + 1e-6)))
        chosen.update(own[(step * count + turn) % len(own)] for turn in range(count))
        room -= count
        weight = max(weight - own[0].weight, own[0].weight)  # of rounded numbers: never none
    return chosen if len(chosen) < len(decoding) else None


def _longest(own: Collection[Sequence], fixed: float, each: float, weight: float, others: int) -> float:
    """Seconds that a step may take for this owner: never less than with one row of each other beside its own."""
    (first, *_), alone = own, fixed + each * len(own)
    return max(_PART * alone * weight / first.weight, alone + each * others)
