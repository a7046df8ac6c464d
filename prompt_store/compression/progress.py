"""How far a compression has come, phase and whole."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """Where a phase stands, and in it the run. `seconds_left` of the phase and `expected` seconds of the whole run are
    estimates, None before there is one. `note` is a word to the user."""

    phase: str
    done: int
    total: int
    loss: float | None = None
    seconds_left: float | None = None
    elapsed: float | None = None
    expected: float | None = None
    note: str | None = None
