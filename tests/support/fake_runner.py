"""A scheduler without a model, and a runner that notices a wrong, stale or unwritten slot."""

from __future__ import annotations

import random
from typing import Any

from softbatch.scheduler.protocol import AddRequest, SamplingParams, SoftPromptRef
from softbatch.scheduler.scheduler import Scheduler
from softbatch.scheduler.scheduler_config import SchedulerConfig
from softbatch.scheduler.sequence import Sequence
from softbatch.scheduler.step import Step, StepResult

EOS = 0


def make_scheduler(**overrides: Any) -> Scheduler:
    values = {
        "max_batch_size": 4,
        "max_batch_tokens": 16,
        "max_model_len": 64,
        "max_queue_size": 100,
        "num_blocks": 64,
        "block_size": 4,
    } | overrides
    return Scheduler(SchedulerConfig(eos_token_ids=frozenset({EOS}), **values))


def request(
    name: str, length: int = 5, max_tokens: int = 8, soft_prompt: SoftPromptRef | None = None, **kw
) -> AddRequest:
    tokens = kw.pop("tokens", None) or list(range(1, length + 1))
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=kw.pop("ignore_eos", True))
    return AddRequest(request_id=name, token_ids=tokens, params=params, soft_prompt=soft_prompt, **kw)


def prompt_ref(name: str, length: int) -> SoftPromptRef:
    return SoftPromptRef(sha256=name, path="/nowhere", num_virtual_tokens=length)


class FakeRunner:
    """Stands where the model stands: a cache of which token lies at which slot, and tokens that follow from it.

    It records for every slot what was written, so that reading a wrong, stale or unwritten slot is noticed. Tokens
    that have been sampled, but not taken in by the scheduler yet, it knows itself. With `resample`, what it says first
    of a token is wrong as often as that, as where a sampler has to look twice: a step launched meanwhile uses that.
    Rows and soft prompts fail as often as `fail` says."""

    def __init__(self, scheduler: Scheduler, resample: float = 0.0, fail: float = 0.0) -> None:
        self.scheduler = scheduler
        self.size = scheduler.config.block_size
        self.slots: dict[int, object] = {}
        self.kinds: dict[str, str] = {}
        self.pending: dict[str, int] = {}
        self.resample = resample
        self.fail = fail
        self.rng = random.Random(7)

    def prepare_grammar(self, grammar: str) -> None:
        """It follows none."""

    def read(self, step: Step, kind: str) -> None:
        for ref in step.soft_prompts_to_load:
            self.kinds[ref.sha256] = kind

    def finish_read(self, sha256: str) -> None:
        prompt = self.scheduler.soft_prompts.get(sha256)
        if self.kinds.pop(sha256) == "kv":
            for position in range(prompt.ref.num_virtual_tokens):
                self.slots[self.slot(prompt.blocks, position)] = (sha256, position)
            self.scheduler.soft_prompt_loads.finish(sha256)
        else:
            self.scheduler.soft_prompt_loads.start_prefill(sha256)

    def slot(self, blocks: list[int], position: int) -> int:
        return blocks[position // self.size] * self.size + position % self.size

    def run(self, step: Step) -> StepResult:
        """Compute a step that has been scheduled, and tell the scheduler that it is in flight."""
        for source, target in step.copies:
            for offset in range(self.size):
                self.slots[target * self.size + offset] = self.slots.get(source * self.size + offset)
        for prompt, start, count in step.prefills:
            for position in range(start, start + count):
                self.slots[self.slot(prompt.blocks, position)] = (prompt.ref.sha256, position)
        known = {row.sequence.request_id: self.known_tokens(row.sequence) for row in step.rows}
        for row in step.rows:
            tokens = known[row.sequence.request_id]
            assert row.end <= row.sequence.num_virtual + len(tokens)
            assert row.end < row.sequence.max_length, "this one has all the tokens that it may have"
            for position in range(row.start, row.end):
                token = tokens[position - row.sequence.num_virtual]
                is_long = self.is_long(row.sequence, len(tokens), position)
                self.slots[self.slot(row.sequence.block_table, position)] = ("token", position, token, is_long)
        sampled, resampled = {}, set()
        for row in step.rows:
            sequence, tokens = row.sequence, known[row.sequence.request_id]
            for position in range(row.end):
                held = self.slots.get(self.slot(sequence.block_table, position))
                if position < sequence.num_virtual:
                    assert held == (sequence.soft_prompt.sha256, position)
                else:
                    is_long = self.is_long(sequence, len(tokens), position)
                    assert held == ("token", position, tokens[position - sequence.num_virtual], is_long)
                    assert is_long is self.turns_as_long(sequence, position)
            if row.end == sequence.length:
                sampled[sequence.request_id] = self.pending[sequence.request_id] = next_token(tokens)
                if self.rng.random() < self.resample:
                    self.pending[sequence.request_id] = 1000
                    resampled.add(sequence.request_id)
        errors = {row.sequence.request_id: "broken" for row in step.rows if self.rng.random() < self.fail}
        prefill_errors = {
            prefill.prompt.ref.sha256: "broken" for prefill in step.prefills if self.rng.random() < self.fail
        }
        self.scheduler.mark_in_flight(step)
        return StepResult(sampled, {}, {}, errors, prefill_errors, frozenset(resampled))

    def is_long(self, sequence: Sequence, num_tokens: int, position: int) -> bool:
        """How transformers turns this position of a sequence that has so many tokens by now."""
        rule = self.scheduler.config.length_rule
        if rule is None:
            return False
        counted = num_tokens if rule.renews and sequence.soft_prompt is None else sequence.num_prompt
        return max(sequence.num_virtual + counted, position + 1) > rule.original

    def turns_as_long(self, sequence: Sequence, position: int) -> bool:
        """The same as a model is told it."""
        rule = self.scheduler.config.length_rule
        return rule is not None and max(sequence.turned_for, position + 1) > rule.original

    def known_tokens(self, sequence: Sequence) -> list[int]:
        """With the token in flight, if there is one."""
        assert sequence.num_in_flight_tokens <= 1
        return [*sequence.tokens, *([self.pending[sequence.request_id]] if sequence.num_in_flight_tokens else [])]


def next_token(tokens: list[int]) -> int:
    return (sum(tokens) * 31 + len(tokens) * 7) % 97
