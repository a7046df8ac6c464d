"""The order of those who wait: by priority, among owners by the tokens they have had for their weight, within an owner
by precedence."""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Callable, Iterable
from itertools import count

from softbatch.scheduler.policy import precedence
from softbatch.scheduler.sequence import Sequence

# Owners of whom nobody waits, but who have had more than their share of late, per scheduler.
MAX_IDLE_LINES = 1024

LineKey = tuple[int, str]
# Priority, whether nobody of the line has been preempted, tokens, and a number that makes it unique.
LinePrecedence = tuple[int, bool, float, int]


class _Line:
    """The waiting sequences of one owner at one priority. `tokens` counts what the owner has had there, divided by its
    weight, on the clock of that priority."""

    __slots__ = ("entry", "heap", "num_preempted", "num_waiting", "number", "tokens", "weight")

    def __init__(self) -> None:
        self.heap: list[tuple[tuple[int, int, int], Sequence]] = []
        self.num_waiting = 0
        self.num_preempted = 0
        self.tokens = 0.0
        self.weight = 1.0
        self.number = 0
        self.entry: LinePrecedence | None = None


class FairOrder:
    """Offers the waiting sequences one by one, so that among owners of one priority the one who has had the fewest
    tokens for its weight goes first: the virtual token counter of Sheng et al., "Fairness in Serving Large Language
    Models".

    Tokens are those computed of prompts, charged at admission, and those generated, charged when the sequence leaves
    the batch. Who is new, or comes back after a pause, starts level with the one served last: nobody saves up a share.
    That level also rises by a part of all that is served, so that nobody starves behind ever new owners. An owner with
    a preempted sequence goes first, for it is paid for, unless that gave way to an owner without a slot. With a single
    owner the order is that of precedence.
    """

    def __init__(self, waits: Callable[[Sequence], bool]) -> None:
        """`waits` tells who still waits; the others are passed over."""
        self._waits = waits
        self._lines: dict[LineKey, _Line] = {}  # of those who wait
        self._weight = 0.0  # of those lines together
        self._weights: defaultdict[int, float] = defaultdict(float)  # the same for each priority
        self._idle: dict[LineKey, _Line] = {}  # the one that waited last is last
        self._clocks: dict[int, float] = {}  # per priority: where newcomers start
        self._heap: list[tuple[LinePrecedence, _Line]] = []
        self._numbers = count()

    def join(self, sequence: Sequence) -> None:
        """It begins to wait."""
        key = (sequence.priority, sequence.owner)
        line = self._lines.get(key)
        if line is None:
            line = self._lines[key] = self._idle.pop(key) if key in self._idle else _Line()
            line.tokens = max(line.tokens, self._clocks.get(sequence.priority, 0.0))
            line.number = next(self._numbers)
            line.weight = sequence.weight
            self._weight += line.weight
            self._weights[sequence.priority] += line.weight
        line.num_waiting += 1
        line.num_preempted += sequence.goes_first
        self.put(sequence)

    def put(self, sequence: Sequence) -> None:
        """Offer a sequence that waits, and is not offered now."""
        line = self._lines[sequence.priority, sequence.owner]
        heapq.heappush(line.heap, (precedence(sequence), sequence))
        entry = self._precedence(sequence.priority, line)
        if line.entry is None or entry < line.entry:
            self._enter(line, entry)

    def peek(self) -> Sequence | None:
        """Who goes first; None if nobody is offered."""
        while self._heap:
            entry, line = self._heap[0]
            while line.heap and not self._waits(line.heap[0][1]):
                heapq.heappop(line.heap)
            now = self._precedence(entry[0], line)
            if entry is not line.entry:
                heapq.heappop(self._heap)
            elif not line.heap:
                heapq.heappop(self._heap)
                line.entry = None
            elif now != entry:
                line.entry = now
                heapq.heapreplace(self._heap, (now, line))
            else:
                return line.heap[0][1]
        return None

    def withdraw(self) -> Sequence:
        """No longer offer the one that `peek` showed; it waits on."""
        return heapq.heappop(self._heap[0][1].heap)[1]

    def leave(self, sequence: Sequence, *, is_served: bool) -> None:
        """It waits no longer."""
        key = (sequence.priority, sequence.owner)
        line = self._lines[key]
        line.num_waiting -= 1
        line.num_preempted -= sequence.goes_first
        if is_served and not sequence.was_admitted:
            self._clocks[sequence.priority] = max(line.tokens, self._clocks.get(sequence.priority, 0.0))
        if not line.num_waiting:
            line.heap.clear()
            line.entry = None
            self._idle[key] = self._lines.pop(key)
            self._weight = self._weight - line.weight if self._lines else 0.0
            self._weights[sequence.priority] -= line.weight
            if not self._lines:
                self._weights.clear()
            if len(self._idle) > MAX_IDLE_LINES:
                del self._idle[next(iter(self._idle))]
        elif len(line.heap) > 2 * line.num_waiting + 16:
            line.heap = [entry for entry in line.heap if self._waits(entry[1])]
            heapq.heapify(line.heap)

    def charge(self, sequence: Sequence, tokens: int) -> None:
        """Its owner has had so many more tokens."""
        key = (sequence.priority, sequence.owner)
        line = self._lines.get(key) or self._idle.get(key)
        if line is not None:
            line.tokens += tokens / sequence.weight
        # A little less than the share of everybody who waits: a light owner starts below a heavy one.
        clock = self._clocks.get(sequence.priority, 0.0)
        self._clocks[sequence.priority] = clock + tokens / (self._weight + 1)

    def weight_beside(self, priority: int, owners: Iterable[str]) -> float:
        """Of those who wait at the priority, but for these owners."""
        own = sum(self._lines[key].weight for owner in owners if (key := (priority, owner)) in self._lines)
        return max(0.0, self._weights.get(priority, 0.0) - own)

    def _precedence(self, priority: int, line: _Line) -> LinePrecedence:
        return (priority, not line.num_preempted, line.tokens, line.number)

    def _enter(self, line: _Line, entry: LinePrecedence) -> None:
        line.entry = entry
        heapq.heappush(self._heap, (entry, line))
        if len(self._heap) > 2 * len(self._lines) + 16:
            self._heap = [pair for pair in self._heap if pair[1].entry is pair[0]]
            heapq.heapify(self._heap)

    def __len__(self) -> int:
        """Entries held, those of sequences that have left included."""
        return len(self._heap) + sum(len(line.heap) for line in self._lines.values())
