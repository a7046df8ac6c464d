"""One request from text to text: reserve, resolve the soft prompt, tokenise, submit, detokenise, stop.

Every route that generates goes through `Generator.start`.
"""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Literal

import msgspec

from softbatch.scheduler.protocol import PromptLogprobs, SamplingParams, SequenceOutput, TokenLogprobs
from softbatch.server.request_failures import PromptTooLong
from softbatch.server.requests.active_request import ActiveRequest
from softbatch.server.requests.admission import Admission, Places
from softbatch.server.requests.leases import Lease
from softbatch.server.requests.output_format import GrammarCompiler, OutputFormat
from softbatch.server.requests.output_text import OutputText
from softbatch.server.requests.prompt_encoder import Prompt, PromptEncoder
from softbatch.server.requests.recall import Recalled, Recaller
from softbatch.server.requests.text import ChatEnd, TextProcessor

EndOfText = Literal["eos", "stop", "length", "timeout"]


@dataclass(frozen=True)
class GenerationRequest:
    """What a route asks for. `prompt` is raw text, token ids or chat turns; `max_tokens` None means the server's
    default, and with `may_clip` it is as many of them as there is room for; `seed` None draws one; `timeout` is in
    seconds, None: the server's. `truncate` keeps only that many of the last prompt tokens, -1: as many as fit. With
    `score_prompt` the prompt's tokens are scored, each with so many alternatives. `shown_tokens` are special tokens
    that are text in this output. `recall` is how many passages of the soft prompt's kept text are put before the
    question, None: what its registration says, and none before a prompt that is scored."""

    prompt: Prompt
    params: SamplingParams
    seed: int | None = None
    max_tokens: int | None = None
    may_clip: bool = False
    stop: tuple[str, ...] = ()
    include_stop: bool = False
    soft_prompt: str | None = None
    truncate: int | None = None
    chat_end: ChatEnd = "answer"
    bad_words: tuple[str, ...] = ()
    add_special_tokens: bool = True
    priority: int = 0
    cache_salt: str = ""
    user: str = ""
    output_format: OutputFormat | None = None
    timeout: float | None = None
    score_prompt: int | None = None
    recall: int | None = None
    shown_tokens: frozenset[int] = frozenset()
    route: str = ""


class TopToken(msgspec.Struct, frozen=True, gc=False):
    id: int
    text: str
    logprob: float
    utf8: bytes


class Token(msgspec.Struct, frozen=True, gc=False):
    """One generated token; `logprob` and `top` are there when log-probabilities were asked for.

    `utf8` is its part of the output's text: of all tokens together the text. It is empty for special tokens, and for
    those behind the end of the text. A broken character's part is that of the U+FFFD that stands for it.
    """

    id: int
    text: str
    special: bool
    utf8: bytes
    logprob: float | None = None
    top: tuple[TopToken, ...] = ()


class Delta(msgspec.Struct, frozen=True, gc=False):
    """What is new since the last one. Only the last has a `finish_reason`; 'stop' names the stop string or token id in
    `stop_reason`, which for 'timeout' is the same word."""

    text: str
    tokens: tuple[Token, ...]
    finish_reason: EndOfText | None = None
    stop_reason: str | int | None = None


class Generation:
    """A started request: iterate over it once for its deltas. Leaving early cancels it."""

    def __init__(
        self,
        request: GenerationRequest,
        active: ActiveRequest,
        lease: Lease | None,
        admission: Admission,
        text: TextProcessor,
        recalled: Recalled,
    ) -> None:
        self.recalled = recalled
        self.created = active.created
        self.completion_tokens = 0
        # Of the prompt's tokens from the second on; there before the first delta.
        self.prompt_scores: list[PromptLogprobs] = []
        self._active = active
        self._lease = lease
        self._admission = admission
        self._text = text
        self._output = OutputText(
            text.tokens,
            active.add.token_ids,
            request.stop,
            include_stop=request.include_stop,
            min_tokens=request.params.min_tokens,
            shown_tokens=request.shown_tokens,
        )
        self._include_stop = request.include_stop
        self._shown_tokens = request.shown_tokens
        self._unsettled: deque[tuple[int, TokenLogprobs | None]] = deque()
        self._finished: float | None = None
        admission.submit(active)

    @property
    def request_id(self) -> str:
        return self._active.request_id

    @property
    def ended_at(self) -> int:
        return self._active.ended_at

    @property
    def prompt_ids(self) -> list[int]:
        return self._active.token_ids

    @property
    def prompt_tokens(self) -> int:
        return self._active.prompt_tokens

    @property
    def virtual_tokens(self) -> int:
        return self._active.virtual_tokens

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that need not be computed: those of the soft prompt, and those in the prefix cache."""
        return self._active.virtual_tokens + self._active.num_cached

    @property
    def seed(self) -> int:
        return self._active.add.params.seed

    @property
    def queue_seconds(self) -> float:
        return (self._active.started or self._active.arrived) - self._active.arrived

    @property
    def first_token_seconds(self) -> float:
        return (self._active.first_token or self._active.arrived) - self._active.arrived

    @property
    def total_seconds(self) -> float:
        return (self._finished or time.monotonic()) - self._active.arrived

    async def __aiter__(self) -> AsyncGenerator[Delta, None]:
        try:
            async with aclosing(self._admission.outputs(self._active)) as batches:
                async for outputs in batches:
                    delta = self._delta(outputs)
                    if delta.finish_reason is not None:
                        self._close("stop")
                    yield delta
                    if delta.finish_reason is not None:
                        return
        finally:
            self._close("cancelled")

    def cancel(self) -> None:
        """Stop working on it; harmless when it has ended."""
        self._close("cancelled")

    def _close(self, reason: str) -> None:
        if self._finished is None:
            self._finished = time.monotonic()
            self._admission.cancel(self._active, reason)
            self._admission.release(self._lease)

    def _delta(self, outputs: Sequence[SequenceOutput]) -> Delta:
        """Text, and the tokens whose part of the text has become certain; one may be more at a time than the other."""
        pieces: list[str] = []
        for output in outputs:
            if output.scores is not None:
                self.prompt_scores = output.scores
            for index, token_id in enumerate(output.token_ids):
                self.completion_tokens += 1
                self._unsettled.append((token_id, output.logprobs[index] if output.logprobs else None))
                if not self._include_stop and self._ends_text(output, index):
                    continue  # what ends the text is not part of it
                pieces.append(self._output.push(token_id))
                if self._output.found is not None:
                    return self._last_delta(pieces, "stop", self._output.found)
        last = outputs[-1]
        if last.finish_reason in ("eos", "stop", "length", "timeout"):
            pieces.append(self._output.finish())
            if self._output.found is not None:
                return self._last_delta(pieces, "stop", self._output.found)
            stop_reason = "timeout" if last.finish_reason == "timeout" else last.stop_token_id
            return self._last_delta(pieces, last.finish_reason, stop_reason)
        return Delta("".join(pieces), tuple(self._settled()))

    def _ends_text(self, output: SequenceOutput, index: int) -> bool:
        token_id = output.token_ids[index]
        if token_id == output.stop_token_id:
            return True
        is_eos = output.finish_reason == "eos" and index == len(output.token_ids) - 1
        return is_eos and token_id in self._shown_tokens

    def _last_delta(self, pieces: list[str], reason: EndOfText, stop_reason: str | int | None) -> Delta:
        tokens = self._settled()
        tokens += [token_of(self._text, token_id, b"", logprobs) for token_id, logprobs in self._unsettled]
        self._unsettled.clear()
        return Delta("".join(pieces), tuple(tokens), reason, stop_reason)

    def _settled(self) -> list[Token]:
        settled = []
        for part in self._output.take_parts():
            token_id, logprobs = self._unsettled.popleft()
            settled.append(token_of(self._text, token_id, part, logprobs))
        return settled


def token_of(text: TextProcessor, token_id: int, utf8: bytes, logprobs: TokenLogprobs | None) -> Token:
    """`utf8` is its part of the text that it stands in."""
    piece, special = text.piece(token_id), text.is_special(token_id)
    if logprobs is None:
        return Token(token_id, piece, special, utf8)
    top = tuple(
        TopToken(top_id, text.piece(top_id), logprob, text.tokens.piece(top_id)[0])
        for top_id, logprob in zip(logprobs.top_ids, logprobs.top_logprobs, strict=True)
    )
    return Token(token_id, piece, special, utf8, logprobs.logprob, top)


class Generator:
    """Turns requests into generations; owns the seeds of requests that bring none."""

    def __init__(
        self,
        admission: Admission,
        text: TextProcessor,
        encoder: PromptEncoder,
        recaller: Recaller,
        grammars: GrammarCompiler,
        seed: int,
        eos_token_ids: Sequence[int] = (),
    ) -> None:
        self._admission = admission
        self._text = text
        self._encoder = encoder
        self._recaller = recaller
        self._grammars = grammars
        self._random = random.Random(seed)
        self._eos = tuple(eos_token_ids)

    async def start(self, request: GenerationRequest) -> Generation:
        """Raises QueueFull, EngineAway, UnknownSoftPrompt, InvalidGrammar, or InvalidPrompt for a prompt that cannot
        be served."""
        return (await self.start_many([request]))[0]

    async def start_many(self, requests: Sequence[GenerationRequest]) -> list[Generation]:
        """All or none: places are reserved and every request is prepared before the first is submitted. They have one
        deadline and one user, those of the first."""
        leases: list[Lease | None] = []
        prepared: list[ActiveRequest] = []
        recalled: list[Recalled] = []
        with self._admission.reserve(len(requests), requests[0].timeout, requests[0].user) as places:
            for request in requests:
                leases.append(await places.lease(request.soft_prompt))
                # Several choices of one prompt are tokenised once.
                same = bool(prepared) and request.prompt is requests[len(prepared) - 1].prompt
                known = prepared[-1].add.token_ids if same else None
                found = recalled[-1] if same else await self._recaller.find(request.prompt, leases[-1], request.recall)
                try:
                    prepared.append(await self._prepare(request, leases[-1], places, known, found))
                except PromptTooLong:
                    # Passages that nobody asked for are no reason to refuse a request that fits without them.
                    if request.recall is not None or not found.passages:
                        raise
                    found = Recalled()
                    prepared.append(await self._prepare(request, leases[-1], places, None, found))
                recalled.append(found)
        return [
            Generation(request, active, lease, self._admission, self._text, found)
            for request, active, lease, found in zip(requests, prepared, leases, recalled, strict=True)
        ]

    async def _prepare(
        self,
        request: GenerationRequest,
        lease: Lease | None,
        places: Places,
        known: list[int] | None,
        recalled: Recalled,
    ) -> ActiveRequest:
        token_ids = known
        self._encoder.check_params(request.params)
        if token_ids is None:
            keep = request.truncate
            if keep == -1:
                keep = max(1, self._encoder.most_that_fit(lease, request.max_tokens) - recalled.tokens)
            token_ids = await self._recaller.token_ids(
                request.prompt, recalled, lease, request.add_special_tokens, chat_end=request.chat_end, keep=keep
            )
        params = request.params
        room = self._encoder.room(
            lease, len(token_ids), request.max_tokens, params.min_tokens, may_clip=request.may_clip
        )
        if params.min_tokens > room:
            message = f"{params.min_tokens} are more than the {room} tokens that there is room for"
            raise PromptTooLong(message, param="min_tokens")
        ends_with_eos = not params.ignore_eos or request.output_format is not None
        endings = (*params.stop_token_ids, *(self._eos if ends_with_eos else ())) if params.min_tokens else ()
        wanted = request.output_format
        params = msgspec.structs.replace(
            params,
            grammar=await self._grammars.compile(wanted) if wanted is not None else "",
            begun=wanted.begun if wanted is not None else "",
            max_tokens=room,
            seed=self._random.getrandbits(63) if request.seed is None else request.seed,
            ending_ids=endings,
            bad_words=self._encoder.bad_words(request.bad_words),
        )
        return places.prepare(
            token_ids,
            params,
            lease,
            route=request.route,
            priority=request.priority,
            cache_salt=request.cache_salt,
            score_from=1 if request.score_prompt is not None else len(token_ids) if room == 0 else None,
            score_top=request.score_prompt or 0,
        )
