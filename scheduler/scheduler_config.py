"""The bounds that a scheduler keeps to."""

from __future__ import annotations

from dataclasses import dataclass

from softbatch.scheduler.length_rule import LengthRule


@dataclass(frozen=True)
class SchedulerConfig:
    max_batch_size: int
    max_batch_tokens: int
    max_model_len: int
    max_queue_size: int
    num_blocks: int
    block_size: int
    eos_token_ids: frozenset[int]
    # Positions of one step whose logits score a prompt's token: each has a row as long as the vocabulary.
    max_scored_tokens: int = 1 << 16
    # Whether blocks that hold output may be reused as a later prompt's: they were computed token by token.
    reuses_output: bool = True
    # Seconds that a step with prefills should take; None: as long as its tokens need.
    step_target: float | None = None
    # Of a model whose positions turn by the length of a sequence.
    length_rule: LengthRule | None = None
