"""How far a compression has come: bars on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as Bars

from softbatch.prompt_store.compression.progress import Progress

SECONDS_BETWEEN_LINES = 10.0
NAMES = {"self_study": "self-study", "gold": "gold answers"}


class ProgressView:
    """Shows each phase with its rate, loss and the time it still takes. Close it at the end."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._phase = ""
        self._began = self._shown = 0.0
        self._first = 0
        self._bars: Bars | None = None
        self._task = TaskID(0)

    def __call__(self, progress: Progress) -> None:
        if progress.phase != self._phase:
            self.close()
            self._phase, self._began, self._first = progress.phase, time.monotonic(), progress.done
        if self._console.is_terminal:
            self._draw(progress)
        else:
            self._print(progress)

    def note(self, text: str) -> None:
        """A line of its own between the phases."""
        self.close()
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        """End the current phase."""
        if self._bars is not None:
            self._bars.stop()
            self._bars = None
        self._phase, self._shown = "", 0.0

    def _draw(self, progress: Progress) -> None:
        if self._bars is None:
            self._bars = Bars(
                TextColumn("{task.description:<13}"),
                BarColumn(bar_width=30),
                TextColumn("{task.completed:.0f}/{task.total:.0f}  {task.fields[details]}"),
                console=self._console,
            )
            self._bars.start()
            self._task = self._bars.add_task(_name(progress), details="")
        self._bars.update(
            self._task, completed=progress.done, total=max(progress.total, 1), details=self._details(progress)
        )

    def _print(self, progress: Progress) -> None:
        now = time.monotonic()
        if progress.done < progress.total and now - self._shown < SECONDS_BETWEEN_LINES:
            return
        self._shown = now
        line = f"{_name(progress):<13} {progress.done}/{progress.total}  {self._details(progress)}"
        self._console.print(line.rstrip(), highlight=False, markup=False, soft_wrap=True)

    def _details(self, progress: Progress) -> str:
        seconds, made = time.monotonic() - self._began, progress.done - self._first
        parts = []
        if made > 0 and seconds > 0.1:
            parts.append(f"{made / seconds:.2f}/s")
        if progress.loss is not None:
            parts.append(f"loss {progress.loss:.4f}")
        if progress.done < progress.total and progress.seconds_left is not None:
            parts.append(f"{duration(progress.seconds_left)} left")
        return "  ".join(parts)


def duration(seconds: float) -> str:
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60}:{whole % 60:02d} min" if whole < 3600 else f"{whole // 3600}:{whole // 60 % 60:02d} h"


def _name(progress: Progress) -> str:
    return NAMES.get(progress.phase, progress.phase)
