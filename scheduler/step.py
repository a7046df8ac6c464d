"""What the scheduler, the engine and the model tell each other: a step, its result, and its news."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from softbatch.scheduler.decode_shares import Shares
from softbatch.scheduler.protocol import PromptLogprobs, SequenceOutput, SoftPromptRef, TokenLogprobs
from softbatch.scheduler.sequence import Sequence
from softbatch.scheduler.soft_prompt_cache import ResidentSoftPrompt

TOO_LITTLE_MEMORY = "the device's memory is too small for this"


class StepRow(NamedTuple):
    """`num_tokens` positions of a sequence, from `start` on. The row is stale if the sequence's epoch has changed."""

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
    """`num_tokens` virtual tokens, from `start` on, of an `embeddings` soft prompt: a chunk of its prefill."""

    prompt: ResidentSoftPrompt
    start: int
    num_tokens: int

    @property
    def is_last(self) -> bool:
        return self.start + self.num_tokens == self.prompt.ref.num_virtual_tokens


class SoftPromptLoad(NamedTuple):
    """From when a soft prompt was needed until it was resident, in monotonic seconds."""

    sha256: str
    since: float
    until: float


@dataclass(eq=False)
class StepReport:
    """The news of one iteration for the front end. With async scheduling, `outputs` are those of the step before."""

    outputs: list[SequenceOutput] = field(default_factory=list)
    admitted: list[str] = field(default_factory=list)
    preempted: list[str] = field(default_factory=list)
    soft_prompt_loads: list[SoftPromptLoad] = field(default_factory=list)


@dataclass(eq=False)
class Step:
    """What one iteration computes: `rows` of sequences and `prefills` of soft prompts, after `copies` of whole blocks
    (source, target). `soft_prompts_to_load` are to be read meanwhile; `report` fills up as the step is made and run."""

    rows: list[StepRow] = field(default_factory=list)
    prefills: list[SoftPromptPrefill] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    soft_prompts_to_load: list[SoftPromptRef] = field(default_factory=list)
    report: StepReport = field(default_factory=StepReport)
    shares: Shares | None = None

    @property
    def num_tokens(self) -> int:
        return sum(row.num_tokens for row in self.rows) + sum(prefill.num_tokens for prefill in self.prefills)

    def prefilled(self) -> dict[str, int]:
        """The tokens of prompts, by whose they are; soft prompts are nobody's."""
        tokens: dict[str, int] = {}
        if self.num_tokens > len(self.rows):
            for row in self.rows:
                if row.num_tokens > 1:
                    tokens[row.sequence.owner] = tokens.get(row.sequence.owner, 0) + row.num_tokens
            for prefill in self.prefills:
                tokens[""] = tokens.get("", 0) + prefill.num_tokens
        return tokens

    @property
    def num_scored(self) -> int:
        """The positions whose logits score a prompt's token."""
        return sum(len(row.sequence.scored_rows(row.start, row.num_tokens)) for row in self.rows)

    def leave_out(self, sequence: Sequence) -> None:
        """Take a sequence out again, while it has its blocks."""
        self.rows = [row for row in self.rows if row.sequence is not sequence]
        self.copies = [copy for copy in self.copies if copy[1] not in sequence.block_table]
        self.report.admitted = [name for name in self.report.admitted if name != sequence.request_id]

    def __bool__(self) -> bool:
        return bool(self.rows or self.prefills)


class OutOfDeviceMemory(Exception):
    """The device had too little memory left for a step. The step has changed nothing and may be run again."""


class DeviceLost(RuntimeError):
    """The device refuses all further work of this process; only a new one helps."""


@dataclass(frozen=True)
class StepResult:
    """What a step has computed, by request id: sampled `tokens`, their `logprobs`, `scores`, and `errors` of rows that
    failed alone. `prefill_errors` are by the content hash of a soft prompt. `state_sums` add up the hidden states that
    a row's pooling asks for.

    `resampled` names sequences for which the next step, already in flight, was launched with another token."""

    tokens: dict[str, int]
    logprobs: dict[str, TokenLogprobs]
    scores: dict[str, list[PromptLogprobs]]
    errors: dict[str, str]
    prefill_errors: dict[str, str]
    resampled: frozenset[str] = frozenset()
    state_sums: dict[str, list[float]] = field(default_factory=dict)
