"""One request's state inside the engine."""

from __future__ import annotations

import hashlib
from array import array

from softbatch.scheduler.protocol import AddRequest, FinishReason


class Sequence:
    """A request inside the engine. `num_computed` counts the positions whose keys and values are computed, those of
    steps in flight included.

    Positions count the soft prompt's virtual tokens first: `length` = virtual tokens + `tokens` +
    `num_in_flight_tokens`, which steps in flight will sample. There are no phases: a step computes some of positions
    num_computed … length−1, and a sequence that reaches `length` samples. `epoch` changes when steps in flight become
    stale: the sequence has left the batch, or the sampler has replaced the token that they started from.
    The scheduler owns every field; the runner only reads.
    """

    __slots__ = (
        "arrival",
        "block_hashes",
        "block_table",
        "cache_salt",
        "epoch",
        "missed_soft_prompt",
        "num_cached",
        "num_computed",
        "num_in_flight_tokens",
        "num_prompt",
        "num_registered",
        "num_virtual",
        "params",
        "priority",
        "request_id",
        "score_from",
        "scores",
        "soft_prompt",
        "tokens",
        "was_admitted",
    )

    def __init__(self, request: AddRequest, arrival: int) -> None:
        self.request_id = request.request_id
        self.tokens = list(request.token_ids)
        self.num_prompt = len(request.token_ids) - request.num_delivered
        self.params = request.params
        self.soft_prompt = request.soft_prompt
        self.num_virtual = request.soft_prompt.num_virtual_tokens if request.soft_prompt else 0
        self.priority = request.priority
        self.cache_salt = request.cache_salt
        self.arrival = arrival
        self.score_from = request.score_from
        self.scores: list[float] = []
        self.num_computed = 0
        self.num_cached = 0
        self.num_in_flight_tokens = 0
        self.epoch = 0
        self.block_table: list[int] = []
        self.block_hashes: list[bytes] = []
        self.num_registered = 0
        self.missed_soft_prompt = False
        self.was_admitted = False

    @property
    def length(self) -> int:
        """Tokens in the sequence so far, virtual and pending ones included."""
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
        """Whether a pending token is the last one it may have."""
        return (
            self.num_in_flight_tokens > 0 and self.num_generated + self.num_in_flight_tokens >= self.params.max_tokens
        )

    @property
    def order(self) -> tuple[int, int]:
        """Smaller goes first; keeps its place through preemption."""
        return (self.priority, self.arrival)

    @property
    def max_length(self) -> int:
        """The longest this sequence can become."""
        return self.num_virtual + self.num_prompt + self.params.max_tokens

    def logit_rows(self, start: int, count: int) -> range:
        """Which of the `count` positions from `start` on, counted from there, need their logits: the last one where
        the sequence samples, or those that come before a token to be scored."""
        first = start - self.num_virtual
        if self.score_from is not None:
            start = max(0, self.score_from - 1 - first)
            return range(start, max(start, min(count, len(self.tokens) - 1 - first)))
        return range(count - 1, count) if start + count == self.length else range(0)

    def finish_reason(self, eos_token_ids: frozenset[int]) -> FinishReason | None:
        """Why the sequence ends with its newest token, or None if it goes on."""
        newest = self.tokens[-1]
        if newest in self.params.stop_token_ids:
            return "stop"
        if not self.params.ignore_eos and newest in eos_token_ids:
            return "eos"
        return "length" if self.num_generated >= self.params.max_tokens else None

    def hash_blocks(self, count: int, block_size: int) -> list[bytes]:
        """SHA-256 of the blocks that follow the soft prompt's own full ones, `count` of them or fewer.

        Each hash covers everything before it: the chain starts from the soft prompt's content hash and the cache
        salt, so blocks are only ever shared between sequences with the same soft prompt, salt and tokens.
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
                parent = hashlib.sha256(f"{identity}\0{self.cache_salt}".encode()).digest()
            tokens = self.tokens[max(0, start - self.num_virtual) : stop - self.num_virtual]
            hashes.append(hashlib.sha256(parent + array("q", tokens).tobytes()).digest())
        return hashes[:count]
