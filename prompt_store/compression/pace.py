"""A run in its time: what is spent of the budget, what is left of a phase's share, whether to stop, and who is told."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from softbatch.prompt_store.compression.progress import Progress
from softbatch.prompt_store.compression.work_directory import JobDirectory

FIRST_CHUNK = 4
LARGEST_CHUNK = 128
CHUNKS_PER_SHARE = 4


class Stopped(Exception):
    """The run was asked to stop; what it has done so far is in its work directory."""


class Pace:
    """`opening` seconds of the `budget` have gone into opening the model; without a budget nothing is ever late."""

    def __init__(
        self,
        budget: float | None,
        opening: float,
        job: JobDirectory,
        clock: Callable[[], float],
        on_progress: Callable[[Progress], None],
        should_stop: Callable[[], bool],
    ) -> None:
        self.opening, self.clock = opening, clock
        self.budget = None if budget is None else max(1.0, budget - opening)
        self.note: str | None = None  # a word to the user that goes with all that is told
        self._job, self._on_progress, self._should_stop = job, on_progress, should_stop

    @property
    def spent(self) -> float:
        """Seconds of the run, without opening the model."""
        return self._job.elapsed()

    @property
    def left(self) -> float:
        """Seconds of the budget. Not to be asked for without one."""
        assert self.budget is not None
        return self.budget - self.spent

    def is_late(self, share: float, coming: float = 0.0) -> bool:
        """Whether `coming` seconds from now that share of the budget will be spent."""
        return self.budget is not None and self.spent + coming > share * self.budget

    def is_stopped(self) -> bool:
        self._job.save()
        return self._should_stop()

    def check_stop(self) -> None:
        """Raises Stopped."""
        if self.is_stopped():
            raise Stopped

    def tell(self, phase: str, done: int, total: int, began: float | None = None, loss: float | None = None) -> None:
        """Of a phase that `began` so, on the clock."""
        left = (self.clock() - began) / done * (total - done) if done and began is not None else None
        self.pass_on(Progress(phase, done, total, loss, left))

    def pass_on(self, progress: Progress) -> None:
        """A phase's own progress, with where the run stands."""
        expected = None if self.budget is None else self.opening + self.budget
        self._on_progress(replace(progress, elapsed=self.opening + self.spent, expected=expected, note=self.note))

    def chunks(self, start: int, total: int, share: float, least: int, largest: int = LARGEST_CHUNK) -> Iterator[range]:
        """Ranges of work from `start` to `total`, the first small and the others as large as the seconds of the one
        before allow; at `share` of the budget, or when the next would end behind it, no more than `least` in all."""
        done, size, rate = start, largest if self.budget is None else FIRST_CHUNK, 0.0
        while done < total:
            self.check_stop()
            if done >= least and self.is_late(share, rate * min(FIRST_CHUNK, total - done)):
                return
            if rate and self.budget is not None:
                room = max(0.0, share * self.budget - self.spent)
                size = int(min(largest, max(FIRST_CHUNK, room / rate / CHUNKS_PER_SHARE)))
            began, chunk = self.clock(), range(done, min(total, done + size))
            yield chunk
            done, rate = chunk.stop, (self.clock() - began) / len(chunk)
