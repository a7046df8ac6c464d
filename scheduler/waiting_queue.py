"""The bounded waiting queue."""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from softbatch.scheduler.policy import precedence
from softbatch.scheduler.sequence import Sequence


class WaitingQueueFull(Exception):
    """The waiting queue holds as many sequences as it may."""


class WaitingQueue:
    """Sequences that are not running, by priority, then arrival; owns the truth of who waits.

    A sequence parked on a soft prompt keeps its place and its share of the bound, but is not offered until
    the soft prompt is unparked. Preempted sequences come back with `push(…, bounded=False)`: they were accepted
    before and their old arrival puts them first.
    """

    def __init__(self, max_size: int) -> None:
        self.max_size = max_size
        self.num_tokens = 0
        self._heap: list[tuple[tuple[int, int], Sequence]] = []
        self._members: dict[str, Sequence] = {}
        self._parked: dict[str, list[Sequence]] = {}

    def __len__(self) -> int:
        return len(self._members)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._members.values())

    def push(self, sequence: Sequence, *, bounded: bool = True) -> None:
        """Raises WaitingQueueFull."""
        if bounded and len(self._members) >= self.max_size:
            raise WaitingQueueFull
        self._members[sequence.request_id] = sequence
        self.num_tokens += sequence.length
        heapq.heappush(self._heap, (precedence(sequence), sequence))

    def peek(self) -> Sequence | None:
        """The next one to admit, or None when nobody can be offered."""
        while self._heap:
            sequence = self._heap[0][1]
            if self._waits(sequence):
                return sequence
            heapq.heappop(self._heap)  # removed meanwhile
        return None

    def pop(self) -> Sequence:
        """Take the sequence that `peek` showed."""
        sequence = heapq.heappop(self._heap)[1]
        self._forget(sequence)
        return sequence

    def park(self, key: str) -> None:
        """Set the sequence that `peek` showed aside until `unpark(key)`."""
        self._parked.setdefault(key, []).append(heapq.heappop(self._heap)[1])

    def unpark(self, key: str) -> list[Sequence]:
        """Offer those parked on `key` again, each at its old place; returns them."""
        parked = [s for s in self._parked.pop(key, []) if self._waits(s)]
        for sequence in parked:
            heapq.heappush(self._heap, (precedence(sequence), sequence))
        return parked

    def remove(self, request_id: str) -> Sequence | None:
        """Take a sequence out wherever it stands; None if it is not waiting."""
        sequence = self._members.get(request_id)
        if sequence is not None:
            self._forget(sequence)
            self._sweep()
        return sequence

    def _sweep(self) -> None:
        """Keep those who left from piling up behind a blocked head: memory stays in proportion to who waits."""
        if len(self._heap) > 2 * len(self._members) + 16:
            self._heap = [entry for entry in self._heap if self._waits(entry[1])]
            heapq.heapify(self._heap)
        for key, parked in list(self._parked.items()):
            if len(parked) > 2 * len(self._members) + 16:
                self._parked[key] = [sequence for sequence in parked if self._waits(sequence)]

    def _waits(self, sequence: Sequence) -> bool:
        return self._members.get(sequence.request_id) is sequence

    def _forget(self, sequence: Sequence) -> None:
        del self._members[sequence.request_id]
        self.num_tokens -= sequence.length
