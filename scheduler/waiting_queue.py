"""The bounded waiting queue."""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from softbatch.scheduler.policy import precedence
from softbatch.scheduler.sequence import Sequence


class WaitingQueueFull(Exception):
    """The waiting queue holds `max_size` sequences."""


class WaitingQueue:
    """Owns the sequences that are not running, in order of precedence.

    A sequence parked on a soft prompt counts as waiting and keeps its precedence, but `peek` does not show it until
    `unpark`. A preempted sequence returns by `push(…, bounded=False)`, for it has been accepted before.
    """

    def __init__(self, max_size: int) -> None:
        self.max_size = max_size
        self.num_tokens = 0
        self._heap: list[tuple[tuple[int, int, int], Sequence]] = []
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
        """The next sequence to admit, or None if there is none or all are parked."""
        while self._heap:
            sequence = self._heap[0][1]
            if self._waits(sequence):
                return sequence
            heapq.heappop(self._heap)  # removed meanwhile
        return None

    def pop(self) -> Sequence:
        """Take the sequence that `peek` showed."""
        sequence = heapq.heappop(self._heap)[1]
        self._drop(sequence)
        return sequence

    def park(self, key: str) -> None:
        """Hide the sequence that `peek` showed until `unpark(key)`."""
        self._parked.setdefault(key, []).append(heapq.heappop(self._heap)[1])

    def unpark(self, key: str) -> list[Sequence]:
        """Let `peek` show the sequences parked on `key` again; returns them."""
        parked = [s for s in self._parked.pop(key, []) if self._waits(s)]
        for sequence in parked:
            heapq.heappush(self._heap, (precedence(sequence), sequence))
        return parked

    def remove(self, request_id: str) -> Sequence | None:
        """Remove a sequence, parked or not; None if it is not waiting."""
        sequence = self._members.get(request_id)
        if sequence is not None:
            self._drop(sequence)
            self._sweep()
        return sequence

    def _sweep(self) -> None:
        """Delete entries of removed sequences behind a blocked head, so that memory stays bounded by the queue."""
        if len(self._heap) > 2 * len(self._members) + 16:
            self._heap = [entry for entry in self._heap if self._waits(entry[1])]
            heapq.heapify(self._heap)
        for key, parked in list(self._parked.items()):
            if len(parked) > 2 * len(self._members) + 16:
                self._parked[key] = [sequence for sequence in parked if self._waits(sequence)]

    def _waits(self, sequence: Sequence) -> bool:
        return self._members.get(sequence.request_id) is sequence

    def _drop(self, sequence: Sequence) -> None:
        del self._members[sequence.request_id]
        self.num_tokens -= sequence.length
