"""Which tokens a grammar allows next: one matcher per sequence, which follows the sequence's output."""

from __future__ import annotations

import os
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from threading import Lock

import numpy as np
from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask, fill_next_token_bitmask_par
from tokenizers import Tokenizer

from softbatch.scheduler.sequence import Sequence

# More than wait and run at once unless --max-queue-size is raised: whoever is evicted is compiled again in a step.
MAX_COMPILED = 512
# Of one grammar; llguidance needs one to two kilobytes for each.
MAX_LEXER_STATES = 50_000
MAX_REASON_CHARS = 300
MAX_THREADS = 8


class GrammarError(Exception):
    """The grammar cannot be followed any further; the message says why in the library's words."""


@dataclass
class _Follower:
    """A matcher and how many output tokens it has taken."""

    matcher: LLMatcher
    num_taken: int = 0


class GrammarMasks:
    """Owns the compiled grammars and a matcher for each sequence that has one.

    A matcher's state depends on the sequence's output alone, so a sequence that is preempted, or resumed in another
    process, goes on as if nothing had happened.
    """

    def __init__(self, make_tokenizer: Callable[[], LLTokenizer], vocab_size: int) -> None:
        self._make_tokenizer = make_tokenizer
        self._vocab_size = vocab_size
        self._tokenizer: LLTokenizer | None = None
        self._making_tokenizer = Lock()
        self._compiled: OrderedDict[str, Future[LLMatcher]] = OrderedDict()
        self._changing_compiled = Lock()
        self._threads: LLExecutor | None = None
        self._followers: weakref.WeakKeyDictionary[Sequence, _Follower] = weakref.WeakKeyDictionary()

    def compile(self, grammar: str) -> LLMatcher:
        """A matcher at the start of `grammar`. Each grammar is compiled once, and only those who ask for it wait.

        Thread-safe. Raises GrammarError.
        """
        with self._changing_compiled:
            future = self._compiled.get(grammar)
            is_new = future is None
            if future is None:
                future = self._compiled[grammar] = Future()
                if len(self._compiled) > MAX_COMPILED:
                    self._compiled.popitem(last=False)
            self._compiled.move_to_end(grammar)
        if is_new:
            try:
                future.set_result(compile_grammar(self._tokens(), grammar, self._vocab_size))
            except BaseException as error:
                future.set_exception(error)
                with self._changing_compiled:
                    self._compiled.pop(grammar, None)
        matcher = future.result()
        with self._changing_compiled:  # a matcher is copied by one thread at a time
            return matcher.deep_copy()

    def _tokens(self) -> LLTokenizer:
        with self._making_tokenizer:
            if self._tokenizer is None:
                self._tokenizer = self._make_tokenizer()
            return self._tokenizer

    def next_masks(self, sequences: Iterable[Sequence]) -> dict[str, np.ndarray | GrammarError]:
        """By request id: one bit per token that may come next, lowest first, int32 [ceil(vocab / 32)], or why there are
        none. Computed by several threads at a time."""
        masks: dict[str, np.ndarray | GrammarError] = {}
        matchers: dict[str, LLMatcher] = {}
        for sequence in sequences:
            try:
                matchers[sequence.request_id] = self._matcher_of(sequence)
            except GrammarError as error:
                masks[sequence.request_id] = error
        table = allocate_token_bitmask(len(matchers), self._vocab_size)
        if len(matchers) > 1:
            if self._threads is None:
                self._threads = LLExecutor(num_threads=min(MAX_THREADS, len(os.sched_getaffinity(0))))
            fill_next_token_bitmask_par(self._threads, [(one, at) for at, one in enumerate(matchers.values())], table)
        else:
            for matcher in matchers.values():
                fill_next_token_bitmask(matcher, table)
        for (request_id, matcher), row in zip(matchers.items(), table, strict=True):
            try:
                _check(matcher)
                masks[request_id] = row
            except GrammarError as error:
                masks[request_id] = error
        return masks

    def allow(self, sequence: Sequence, token: int) -> bool:
        """Whether this token may come next. False of end tokens and where there is an error: the mask tells more."""
        try:
            matcher = self._matcher_of(sequence)
            allows = matcher.validate_tokens([token]) == 1
            _check(matcher)
        except GrammarError:
            return False
        return allows

    def _matcher_of(self, sequence: Sequence) -> LLMatcher:
        """Behind all tokens of its output. Raises GrammarError."""
        follower = self._followers.get(sequence)
        if follower is None:
            matcher = self.compile(sequence.params.grammar)
            begin(matcher, self._tokens(), sequence.params.begun)
            follower = self._followers[sequence] = _Follower(matcher)
        new = sequence.tokens[sequence.num_prompt + follower.num_taken :]
        if new:
            follower.matcher.consume_tokens(new)
            follower.num_taken += len(new)
        _check(follower.matcher)
        return follower.matcher


def compile_grammar(tokenizer: LLTokenizer, grammar: str, vocab_size: int) -> LLMatcher:
    """A matcher with its first mask computed, which may take much longer than later ones. Raises GrammarError."""
    limits = LLParserLimits(verbose_errors=False, max_lexer_states=MAX_LEXER_STATES)
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
    _mask(matcher, vocab_size)
    return matcher


def begin(matcher: LLMatcher, tokenizer: LLTokenizer, text: str) -> None:
    """Put the matcher behind a text, however a tokenizer would cut that. Raises GrammarError."""
    tokens = tokenizer.greedy_tokenize(text) if text else []
    if matcher.try_consume_tokens(tokens) < len(tokens) or tokenizer.decode_bytes(tokens) != text.encode():
        raise GrammarError("what the last message begins is no beginning of such an output")


def _mask(matcher: LLMatcher, vocab_size: int) -> np.ndarray:
    _check(matcher)
    mask: np.ndarray = allocate_token_bitmask(1, vocab_size)
    fill_next_token_bitmask(matcher, mask)
    _check(matcher)
    row: np.ndarray = mask[0]
    return row


def grammar_tokenizer(tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Iterable[int]) -> LLTokenizer:
    """A model's tokens as grammars see them. `vocab_size` is the number of logits, of which some may have no token."""
    content = tokenizer.to_str()
    size = max(vocab_size, tokenizer.get_vocab_size())
    return LLTokenizer(content, n_vocab=size, eos_token=list(eos_token_ids))


def _check(matcher: LLMatcher) -> None:
    if matcher.is_error():
        raise GrammarError(" ".join(matcher.get_error().split())[:MAX_REASON_CHARS] or "it cannot be compiled")
