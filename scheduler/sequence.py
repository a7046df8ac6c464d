"""One request's state inside the engine."""

from __future__ import annotations

import hashlib
from array import array
from operator import add

from softbatch.scheduler.length_rule import LengthRule
from softbatch.scheduler.protocol import AddRequest, FinishReason, PromptLogprobs, SequenceOutput


class Sequence:
    """A request inside the engine. The scheduler owns every field; the runner only reads.

    There are no phases. `num_computed` counts the positions whose keys and values are computed, including those of
    steps in flight. A step computes some of the positions num_computed … length−1. If it reaches `length`, a token is
    sampled. Virtual tokens come first: `length` = virtual tokens + `tokens` + `num_in_flight_tokens`. The last are
    tokens that steps in flight will sample.

    A change of `epoch` makes the steps in flight stale. That happens if the sequence leaves the batch, or if the
    sampler replaces the token that the next step has started from.
    """

    __slots__ = (
        "__weakref__",
        "arrival",
        "block_hashes",
        "block_table",
        "cache_salt",
        "epoch",
        "gave_way",
        "missed_soft_prompt",
        "num_cached",
        "num_charged",
        "num_computed",
        "num_in_flight_tokens",
        "num_prompt",
        "num_registered",
        "num_virtual",
        "outgrows",
        "owner",
        "params",
        "pooling",
        "priority",
        "request_id",
        "score_from",
        "score_top",
        "scores",
        "soft_prompt",
        "state_sum",
        "tokens",
        "turn",
        "turned_for",
        "was_admitted",
        "weight",
    )

    def __init__(self, request: AddRequest, arrival: int, turn: int = 0, length_rule: LengthRule | None = None) -> None:
        self.request_id = request.request_id
        self.tokens = list(request.token_ids)
        self.num_prompt = len(request.token_ids) - request.num_delivered
        self.params = request.params
        self.soft_prompt = request.soft_prompt
        self.num_virtual = request.soft_prompt.num_virtual_tokens if request.soft_prompt else 0
        self.priority = request.priority
        self.owner = request.owner
        self.weight = request.weight
        self.cache_salt = request.cache_salt
        self.arrival = arrival
        self.turn = turn
        # Whoever resumes behind a first output token has the scores: they came with it.
        self.score_from = None if request.num_delivered else request.score_from
        self.score_top = request.score_top
        self.scores: list[PromptLogprobs] = []
        self.pooling = request.pooling
        self.state_sum: list[float] = []  # of the hidden states computed so far
        self.num_computed = 0
        self.num_cached = 0
        self.num_charged = request.num_delivered  # of those generated
        self.num_in_flight_tokens = 0
        self.epoch = 0
        self.block_table: list[int] = []
        self.block_hashes: list[bytes] = []
        self.num_registered = 0
        self.missed_soft_prompt = False
        self.was_admitted = False
        self.gave_way = False  # left the batch for another owner's sake
        self.turned_for = 0  # tokens: no position turns as in a shorter sequence
        self.outgrows: int | None = None  # beyond so many tokens all of it is computed again
        if length_rule is not None:
            self._follow(length_rule)

    def _follow(self, rule: LengthRule) -> None:
        renews = rule.renews and self.soft_prompt is None
        if self.num_virtual + (len(self.tokens) if renews else self.num_prompt) > rule.original:
            self.turned_for = rule.long
            self.soft_prompt = self.soft_prompt and rule.soft_prompt_of(self.soft_prompt, self.num_prompt)
        elif renews:
            self.outgrows = rule.original

    @property
    def is_outgrown(self) -> bool:
        """Whether it has become so long that all of it is to be computed again."""
        return self.outgrows is not None and self.length > self.outgrows

    def turn_as_long(self) -> None:
        """What is computed from now on shares nothing with what was computed before."""
        assert self.outgrows is not None
        self.turned_for, self.outgrows = self.outgrows + 1, None
        self.block_hashes = []

    @property
    def goes_first(self) -> bool:
        """Whether its owner does: it was preempted, though it had no more than its share, and is paid for."""
        return self.was_admitted and not self.gave_way

    @property
    def length(self) -> int:
        """All tokens so far, virtual ones and those in flight included."""
        return self.num_virtual + len(self.tokens) + self.num_in_flight_tokens

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def may_end(self) -> bool:
        """Whether the token that is sampled next may end the text."""
        return self.num_generated + self.num_in_flight_tokens >= self.params.min_tokens

    @property
    def will_end(self) -> bool:
        """Whether a token in flight is the last that `max_tokens` allows."""
        return (
            self.num_in_flight_tokens > 0 and self.num_generated + self.num_in_flight_tokens >= self.params.max_tokens
        )

    @property
    def awaits_token(self) -> bool:
        """Whether what it samples next depends on a token that is still in flight."""
        if self.num_in_flight_tokens == 0:
            return False
        return bool(self.params.grammar) or any(len(word) > 1 for word in self.params.bad_words)

    @property
    def is_decoding(self) -> bool:
        """Whether the next step can compute its last token alone, and sample another."""
        is_last = self.length - self.num_computed == 1
        return is_last and not self.will_end and not self.awaits_token and not self.is_outgrown

    @property
    def max_length(self) -> int:
        """The length at which the sequence must end."""
        return self.num_virtual + self.num_prompt + self.params.max_tokens

    def logit_rows(self, start: int, count: int) -> range:
        """Which of the `count` positions from `start` on need logits, counted from `start`: the last one if a token is
        sampled, and those before a token to be scored; or, with pooling, those that are pooled."""
        if self.pooling == "mean":
            return range(count)
        samples = start + count == self.length
        if self.score_from is None:
            return range(count - 1, count) if samples else range(0)
        scored = self.scored_rows(start, count)
        if not samples or (self.params.max_tokens == 0 and self.pooling is None):
            return scored
        return range(scored.start if scored else count - 1, count)

    @property
    def num_reusable(self) -> int:
        """How many tokens need not be computed if their keys and values are known, but for the last of them: the
        position before a sampled or scored token always is, and so is every one that is pooled."""
        if self.pooling == "mean":
            return 0
        return len(self.tokens) if self.score_from is None else self.score_from

    def add_states(self, states: list[float]) -> None:
        self.state_sum = list(map(add, self.state_sum, states)) if self.state_sum else states

    def take_embedding(self) -> list[float]:
        """What the pooling makes of the whole prompt."""
        count = self.num_prompt if self.pooling == "mean" else 1
        found, self.state_sum = [value / count for value in self.state_sum], []
        return found

    def scored_rows(self, start: int, count: int) -> range:
        """Which of the `count` positions from `start` on are before a token to be scored, counted from `start`."""
        if self.score_from is None:
            return range(0)
        first = start - self.num_virtual
        begin = max(0, self.score_from - 1 - first)
        return range(begin, max(begin, min(count, self.num_prompt - 1 - first)))

    def finish_reason(self, eos_token_ids: frozenset[int]) -> FinishReason | None:
        """Why the sequence ends with its newest token, or None if it goes on."""
        newest = self.tokens[-1]
        if newest in self.params.stop_token_ids:
            return "stop"
        if newest in eos_token_ids and (self.params.grammar or not self.params.ignore_eos):
            return "eos"
        return "length" if self.num_generated >= self.params.max_tokens else None

    def failure(self, message: str) -> SequenceOutput:
        """The last output of a sequence that ends with an error."""
        return SequenceOutput(self.request_id, self.num_computed, finish_reason="error", error=message)

    def hash_blocks(self, count: int, block_size: int) -> list[bytes]:
        """SHA-256 of up to `count` full blocks that follow the soft prompt's own full blocks.

        Each hash covers all blocks before it. The chain starts from the soft prompt's content hash, the cache salt, and
        how positions turn, so that only sequences with the same of these, and the same tokens, share blocks.
        """
        hashes = self.block_hashes
        first = self.num_virtual // block_size
        while len(hashes) < count:
            start = (first + len(hashes)) * block_size
            stop = start + block_size
            if stop > self.num_virtual + len(self.tokens):
                break
            if hashes:
                parent = hashes[-1]
            else:
                identity = self.soft_prompt.sha256 if self.soft_prompt else ""
                turned = f"{self.turned_for}\0" if self.turned_for else ""
                parent = hashlib.sha256(f"{turned}{identity}\0{self.cache_salt}".encode()).digest()
            tokens = self.tokens[max(0, start - self.num_virtual) : stop - self.num_virtual]
            hashes.append(hashlib.sha256(parent + array("q", tokens).tobytes()).digest())
        return hashes[:count]
