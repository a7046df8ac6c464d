"""How several owners share the steps that decode: a light owner keeps its part of the pace."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from softbatch.scheduler.fair_order import FairOrder
from softbatch.scheduler.policy import is_background
from softbatch.scheduler.sequence import Sequence
from softbatch.scheduler.step_pace import LEAST

# Steps that the cost of the next one is told from, the latest ones most; with fewer, or all alike, it is not known.
_REMEMBERED = 64
_LEAST_STEPS = 8
_LEAST_VARIANCE = 1.0
_MOST_PREFILL = 1 << 30  # tokens that cost nothing have no bound
# Of what a light owner may be slowed down by while it decodes; the rest is for its waits for a slot and the like.
_PART = 0.7
# Until the cost is known, one step in so many takes no prefills, and every other of these one row of each owner.
_TRIAL = 8
# What steps took too long is made good by later ones, up to so many times what one of them may take.
_MOST_LATE = 8
# So much of it is forgiven in a step without prefills, so that they go on however slow the steps are.
_FORGIVEN = 0.1

Owners = Mapping[str, list[Sequence]]


class StepCost:
    """What a step that only decodes takes, as a straight line over its rows, and what a token of a prefill adds;
    learnt from the steps."""

    def __init__(self) -> None:
        self._steps = self._rows = self._seconds = self._rows_rows = self._rows_seconds = 0.0
        self._prefilled = self._prefill_seconds = 0.0
        self._each: float | None = None  # told from the latest steps that were not all alike

    def observe(self, rows: int, seconds: float, prefilled: int = 0) -> None:
        keep = 1 - 1 / _REMEMBERED
        if prefilled:
            if (line := self.near_line) is not None:
                self._prefilled = keep * self._prefilled + prefilled
                self._prefill_seconds = keep * self._prefill_seconds + max(0.0, seconds - line[0] - line[1] * rows)
            return
        self._steps = keep * self._steps + 1
        self._rows = keep * self._rows + rows
        self._seconds = keep * self._seconds + seconds
        self._rows_rows = keep * self._rows_rows + rows * rows
        self._rows_seconds = keep * self._rows_seconds + rows * seconds
        mean = self._rows / self._steps
        variance = self._rows_rows / self._steps - mean * mean
        if self._steps >= _LEAST_STEPS and variance >= _LEAST_VARIANCE:
            self._each = max(0.0, (self._rows_seconds - mean * self._seconds) / self._steps / variance)

    def line(self) -> tuple[float, float] | None:
        """Seconds of every step, and of each row; None if that is not known."""
        if self._each is None:
            return None
        return max(0.0, (self._seconds - self._each * self._rows) / self._steps), self._each

    @property
    def near_line(self) -> tuple[float, float] | None:
        """As `line`, or right only for about as many rows as the latest steps had."""
        if (line := self.line()) is not None or self._steps < _LEAST_STEPS:
            return line
        return self._seconds / self._steps, 0.0

    @property
    def prefill_token(self) -> float:
        """Seconds that one adds; 0 before any was seen."""
        return self._prefill_seconds / self._prefilled if self._prefilled else 0.0


@dataclass(frozen=True)
class Shares:
    """How owners share a step: those of `chosen` decode (None: all), and prompts get so many tokens (None: as ever).

    Each owner of `paces` decodes and has no prompt to read: for it the step may take so many times as long as its own
    rows, which take so many seconds."""

    chosen: Collection[Sequence] | None = None
    prefills: int | None = None
    paces: Mapping[str, tuple[float, float]] = field(default_factory=dict)


class SharedPace:
    """Plans the steps of several owners. What others' prefills, or anything else, made longer than an owner's part of
    the pace allows is owed: until it is made good, steps have fewer rows and no prefills."""

    def __init__(self, *, cuts_prefills: bool) -> None:
        """`cuts_prefills`: whether steps have a target; where they have none, prefills are not held up either."""
        self.cost = StepCost()
        self._cuts_prefills = cuts_prefills
        self._late = 0.0

    def plan(self, running: Iterable[Sequence], waiting: FairOrder, number: int) -> Shares | None:
        """For the step of that number; None if nobody shares it. `running` is in order of precedence."""
        weights: dict[str, float] = {}
        owners: dict[str, list[Sequence]] = {}
        load = 0  # rows, and chunks of prompts
        priorities, reading = set(), set()
        for sequence in running:
            if is_background(sequence):
                break
            weights[sequence.owner] = sequence.weight
            load += -(-max(1, sequence.length - sequence.num_computed) // LEAST)
            priorities.add(sequence.priority)
            if sequence.is_decoding:
                owners.setdefault(sequence.owner, []).append(sequence)
            elif sequence.length - sequence.num_computed > 1:
                reading.add(sequence.owner)
        if len(weights) < 2 or len(priorities) > 1 or len(owners) < (1 if self._cuts_prefills else 2):
            return None
        total = sum(weights.values()) + waiting.weight_beside(priorities.pop(), weights)
        line = self.cost.near_line if len(owners) == 1 else self.cost.line()
        chosen = who_decodes(owners, self.cost, number, weight=total, load=load, late=self._late)
        if line is None and number % _TRIAL == 0:
            return Shares(chosen, 0)
        paces: dict[str, tuple[float, float]] = {}
        if line is not None and self._cuts_prefills:
            paces = {owner: (_times(own, total, load), line[0] + line[1] * len(own)) for owner, own in owners.items()}
            paces = {owner: pace for owner, pace in paces.items() if owner not in reading}
        if not paces:
            return Shares(chosen, None if chosen is None else LEAST)
        longest, token = min(times * alone for times, alone in paces.values()), self.cost.prefill_token
        if self._late > _FORGIVEN * longest:
            return Shares(chosen, 0, paces)
        return Shares(chosen, max(LEAST, int(min(longest / token, _MOST_PREFILL))) if token else LEAST, paces)

    def observe(self, rows: int, prefilled: Mapping[str, int], shares: Shares | None, seconds: float) -> None:
        """A step took so long, with so many rows that decode, and so many tokens of each owner's prompts."""
        self.cost.observe(rows, seconds, sum(prefilled.values()))
        if shares is None or not shares.paces:
            self._late = 0.0
            return
        token = self.cost.prefill_token
        most = min(times * (alone + token * prefilled.get(owner, 0)) for owner, (times, alone) in shares.paces.items())
        late = min(self._late + seconds - most, _MOST_LATE * most)
        if not prefilled:
            late = min(late, (1 - _FORGIVEN) * self._late)
        self._late = max(0.0, late)


def who_decodes(
    owners: Owners, cost: StepCost, step: int, *, weight: float = 0.0, load: int = 0, late: float = 0.0
) -> Collection[Sequence] | None:
    """Those of the owners' sequences that the step of that number takes; None: all. `weight` is that of all owners,
    `load` their rows and chunks of prompts; the steps before this were so many seconds `late`.

    With the whole machine to itself, an owner's step would take as long as its own rows do. Beside others of the same
    weight it may take as many times that as there are owners, and by weights accordingly: no owner's tokens come any
    slower. If all rows would take longer, owners with many take turns with theirs. Rows of different priorities do not
    share. On a machine whose steps take as long for many rows as for few, nobody ever waits.
    """
    if len(owners) < 2:
        return None
    line = cost.line()
    if line is None:
        return {own[0] for own in owners.values()} if step % (2 * _TRIAL) == 0 else None
    fixed, each = line
    if each == 0:
        return None
    here = sum(own[0].weight for own in owners.values())
    weight, count_all = max(here, weight), sum(map(len, owners.values()))
    load = max(count_all, load)
    longest = min(
        # Never less than with one row of each other beside its own.
        max((fixed + each * len(own)) * _times(own, weight, load), fixed + each * (len(own) + len(owners) - 1))
        for own in owners.values()
    )
    room = int((longest - fixed) / each + 1e-6)
    if late > 0:  # but the lightest owner keeps its rows
        least = math.ceil(min(len(own) * here / own[0].weight for own in owners.values()) - 1e-6)
        room = min(room, max(least, int((longest - late - fixed) / each)))
    room = max(len(owners), room)
    if room >= count_all:
        return None
    chosen: set[Sequence] = set()
    for own in sorted(owners.values(), key=lambda own: len(own) / own[0].weight):
        count = min(len(own), max(1, int(room * own[0].weight / here + 1e-6)))
        chosen.update(own[(step * count + turn) % len(own)] for turn in range(count))
        room -= count
        here = max(here - own[0].weight, own[0].weight)  # of rounded numbers: never none
    return chosen if len(chosen) < count_all else None


def _times(own: list[Sequence], weight: float, load: int) -> float:
    """How many times as long as its own rows a step may take for this owner: as its part of the weight has it, and less
    if its part of the load is smaller than that."""
    times = weight / own[0].weight
    return times * (_PART + (1 - _PART) * min(1.0, times * len(own) / load))
