"""What scheduler and model tell each other: a step, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from scheduler.messages import SoftPromptRef, TokenLogprobs
from scheduler.sequence import Sequence
from scheduler.soft_prompts import ResidentSoftPrompt


@dataclass(eq=False)
class Step:
    """What one iteration computes: rows of new tokens, after `copies` of whole blocks (source, target)."""

    rows: list[tuple[Sequence, int]] = field(default_factory=list)
    fills: list[tuple[ResidentSoftPrompt, int]] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    reads: list[SoftPromptRef] = field(default_factory=list)
    admitted: list[str] = field(default_factory=list)
    preempted: list[str] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(count for _, count in self.rows) + sum(count for _, count in self.fills)

    def __bool__(self) -> bool:
        return bool(self.rows or self.fills)


class OutOfDeviceMemory(Exception):
    """The device had too little memory left for a step; nothing of the step counts, and it may be run again."""


class DeviceLost(RuntimeError):
    """The device refuses all further work of this process; only a new one helps."""


@dataclass(frozen=True)
class StepResult:
    """The sampled token of each row that reached its end, by request id; `errors` names rows that failed alone."""

    tokens: dict[str, int]
    logprobs: dict[str, TokenLogprobs]
    scores: dict[str, list[float]]
    errors: dict[str, str]
    fill_errors: dict[str, str]
