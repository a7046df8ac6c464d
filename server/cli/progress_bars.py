"""How far a compression has come: one bar for the whole run on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as Bars

from softbatch.prompt_store.compression.progress import Progress

SECONDS_BETWEEN_LINES = 10.0
NAMES = {"self_study": "self-study", "gold": "gold answers"}
WIDTH = 1000


class ProgressView:
    """Shows phase, elapsed time, budget and what is left of it. Close it at the end."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._phase = ""
        self._note: str | None = None
        self._shown = 0.0
        self._bars: Bars | None = None
        self._task = TaskID(0)

    def __call__(self, progress: Progress) -> None:
        if progress.note not in (None, self._note):
            self.note(progress.note or "")
            self._note = progress.note
        if progress.phase != self._phase:
            self._phase, self._shown = progress.phase, 0.0
        if self._console.is_terminal:
            self._draw(progress)
        else:
            self._print(progress)

    def note(self, text: str) -> None:
        """A line of its own, above the bar."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        """Take the bar away."""
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    def _draw(self, progress: Progress) -> None:
        if self._bars is None:
            self._bars = Bars(
                TextColumn("{task.description:<13}"),
                BarColumn(bar_width=30),
                TextColumn("{task.fields[details]}"),
                console=self._console,
                transient=True,
            )
            self._bars.start()
            self._task = self._bars.add_task(_name(progress), total=WIDTH, details="")
        self._bars.update(
            self._task,
            description=_name(progress),
            completed=round(WIDTH * _part(progress)),
            details=_details(progress),
        )

    def _print(self, progress: Progress) -> None:
        now = time.monotonic()
        if progress.done < progress.total and now - self._shown < SECONDS_BETWEEN_LINES:
            return
        self._shown = now
        line = f"{_name(progress):<13} {_details(progress)}"
        self._console.print(line.rstrip(), highlight=False, markup=False, soft_wrap=True)


def _name(progress: Progress) -> str:
    return NAMES.get(progress.phase, progress.phase)


def _part(progress: Progress) -> float:
    """Of the whole run where its length is known, else of the phase."""
    if progress.expected and progress.elapsed is not None:
        return min(1.0, progress.elapsed / progress.expected)
    return progress.done / max(1, progress.total)


def _details(progress: Progress) -> str:
    parts = [f"{progress.done}/{progress.total}"]
    if progress.loss is not None:
        parts.append(f"loss {progress.loss:.4f}")
    if progress.elapsed is not None and progress.expected is not None:
        parts.append(f"{duration(progress.elapsed)} of {duration(progress.expected)}")
        parts.append(f"{duration(max(0.0, progress.expected - progress.elapsed))} left")
    elif progress.elapsed is not None:
        parts.append(duration(progress.elapsed))
    if progress.expected is None and progress.done < progress.total and progress.seconds_left is not None:
        parts.append(f"{duration(progress.seconds_left)} left of this phase")
    return "  ".join(parts)


def duration(seconds: float) -> str:
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60}:{whole % 60:02d} min" if whole < 3600 else f"{whole // 3600}:{whole // 60 % 60:02d} h"
