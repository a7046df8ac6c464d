"""What scheduler and model tell each other: a step, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from softbatch.scheduler.protocol import SoftPromptRef, TokenLogprobs
from softbatch.scheduler.sequence import Sequence
from softbatch.scheduler.soft_prompt_cache import ResidentSoftPrompt


class StepRow(NamedTuple):
    """`num_tokens` positions of a sequence, from `start` on; it counts for nothing once its epoch is another."""

    sequence: Sequence
    start: int
    num_tokens: int
    epoch: int

    @property
    def end(self) -> int:
        return self.start + self.num_tokens

    @property
    def is_stale(self) -> bool:
        return self.epoch != self.sequence.epoch


class SoftPromptPrefill(NamedTuple):
    """`num_tokens` virtual tokens, from `start` on, of a soft prompt whose keys and values are computed."""

    prompt: ResidentSoftPrompt
    start: int
    num_tokens: int

    @property
    def is_last(self) -> bool:
        return self.start + self.num_tokens == self.prompt.ref.num_virtual_tokens


@dataclass(eq=False)
class Step:
    """What one iteration computes: rows of new tokens, after `copies` of whole blocks (source, target)."""

    rows: list[StepRow] = field(default_factory=list)
    prefills: list[SoftPromptPrefill] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    soft_prompts_to_load: list[SoftPromptRef] = field(default_factory=list)
    admitted: list[str] = field(default_factory=list)
    preempted: list[str] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(row.num_tokens for row in self.rows) + sum(prefill.num_tokens for prefill in self.prefills)

    def __bool__(self) -> bool:
        return bool(self.rows or self.prefills)


class OutOfDeviceMemory(Exception):
    """The device had too little memory left for a step; nothing of the step counts, and it may be run again."""


class DeviceLost(RuntimeError):
    """The device refuses all further work of this process; only a new one helps."""


@dataclass(frozen=True)
class StepResult:
    """The sampled token of each row that reached its end, by request id; `errors` names rows that failed alone.

    `resampled` names rows whose token is not the one that a step launched meanwhile has taken for it."""

    tokens: dict[str, int]
    logprobs: dict[str, TokenLogprobs]
    scores: dict[str, list[float]]
    errors: dict[str, str]
    prefill_errors: dict[str, str]
    resampled: frozenset[str] = frozenset()
