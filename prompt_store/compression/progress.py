"""How far a compression has come."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """Where a phase stands; `seconds_left` is an estimate, None before there is one."""

    phase: str
    done: int
    total: int
    loss: float | None = None
    seconds_left: float | None = None
