"""The bounded waiting queue."""

from __future__ import annotations

from collections.abc import Iterator

from softbatch.scheduler.fair_order import FairOrder
from softbatch.scheduler.sequence import Sequence


class WaitingQueueFull(Exception):
    """The waiting queue holds `max_size` sequences."""


class WaitingQueue:
    """Owns the sequences that are not running; `order` has the order in which they are admitted.

    A sequence parked on a soft prompt counts as waiting and keeps its place, but `peek` does not show it until
    `unpark`. A preempted sequence returns by `push(…, bounded=False)`, for it has been accepted before.
    """

    def __init__(self, max_size: int) -> None:
        self.max_size = max_size
        self.num_tokens = 0
        self.order = FairOrder(self._waits)
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
        self.order.join(sequence)

    def peek(self) -> Sequence | None:
        """The next sequence to admit, or None if there is none or all are parked."""
        return self.order.peek()

    def pop(self) -> Sequence:
        """Take the sequence that `peek` showed."""
        sequence = self.order.withdraw()
        self._drop(sequence, is_served=True)
        return sequence

    def park(self, key: str) -> None:
        """Hide the sequence that `peek` showed until `unpark(key)`."""
        self._parked.setdefault(key, []).append(self.order.withdraw())

    def unpark(self, key: str) -> list[Sequence]:
        """Let `peek` show the sequences parked on `key` again; returns them."""
        parked = [s for s in self._parked.pop(key, []) if self._waits(s)]
        for sequence in parked:
            self.order.put(sequence)
        return parked

    def remove(self, request_id: str) -> Sequence | None:
        """Remove a sequence, parked or not; None if it is not waiting."""
        sequence = self._members.get(request_id)
        if sequence is not None:
            self._drop(sequence, is_served=False)
            self._sweep()
        return sequence

    def _sweep(self) -> None:
        """Forget removed sequences that are parked, so that memory stays bounded by the queue."""
        for key, parked in list(self._parked.items()):
            if len(parked) > 2 * len(self._members) + 16:
                self._parked[key] = [sequence for sequence in parked if self._waits(sequence)]

    def _waits(self, sequence: Sequence) -> bool:
        return self._members.get(sequence.request_id) is sequence

    def _drop(self, sequence: Sequence, *, is_served: bool) -> None:
        del self._members[sequence.request_id]
        self.order.leave(sequence, is_served=is_served)
        self.num_tokens -= sequence.length
