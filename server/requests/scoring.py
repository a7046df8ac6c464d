"""log Pr(y | σ or context or nothing, z) of given candidates y: which of them would the model choose?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from softbatch.scheduler.protocol import SamplingParams
from softbatch.server.request_failures import InvalidPrompt, PromptTooLong
from softbatch.server.requests.admission import Admission
from softbatch.server.requests.leases import Lease
from softbatch.server.requests.prompt_encoder import Prompt, PromptEncoder
from softbatch.server.requests.recall import Recalled, Recaller


@dataclass(frozen=True)
class CandidateScore:
    """`logprobs` of each of its `token_ids`, given the input and the tokens before."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]

    @property
    def logprob(self) -> float:
        return sum(self.logprobs)


@dataclass(frozen=True)
class Scores:
    """`prompt_tokens` are those of the input that all candidates share."""

    candidates: tuple[CandidateScore, ...]
    prompt_tokens: int
    virtual_tokens: int
    recalled: Recalled


class Scorer:
    """Scores candidates as requests like any other: queued, batched, preempted, cancelled when the caller leaves."""

    def __init__(
        self, admission: Admission, encoder: PromptEncoder, recaller: Recaller, eos_token_ids: Sequence[int]
    ) -> None:
        self._admission = admission
        self._recaller = recaller
        self._encoder = encoder
        self._eos = tuple(eos_token_ids[:1])

    async def score(
        self,
        prompt: Prompt,
        candidates: Sequence[str],
        *,
        soft_prompt: str | None,
        recall: int | None,
        end: bool,
        route: str,
    ) -> Scores:
        """`recall` as in a GenerationRequest. With `end` a candidate is a whole answer: the token that ends a turn is
        part of it. Raises Failure."""
        with self._admission.reserve(len(candidates)) as places:
            lease = await places.lease(soft_prompt)
            answers = [await self._answer(text, index, end) for index, text in enumerate(candidates)]
            longest = max(map(len, answers))
            recalled = await self._recaller.find(prompt, lease, recall)
            try:
                shared = await self._shared(prompt, recalled, lease, longest)
            except PromptTooLong:
                # Passages that nobody asked for are no reason to refuse a request that fits without them.
                if recall is not None or not recalled.passages:
                    raise
                recalled = Recalled()
                shared = await self._shared(prompt, recalled, lease, longest)
            params = SamplingParams(max_tokens=0)
            requests = [
                places.prepare(shared + answer, params, lease, route=route, score_from=len(shared))
                for answer in answers
            ]
        try:
            outputs = await self._admission.run(requests)
        finally:
            self._admission.release(lease)
        scored = [tuple(score.logprob for score in output.scores or ()) for output in outputs]
        return Scores(
            tuple(CandidateScore(tuple(a), s) for a, s in zip(answers, scored, strict=True)),
            prompt_tokens=len(shared),
            virtual_tokens=lease.ref.num_virtual_tokens if lease else 0,
            recalled=recalled,
        )

    async def _shared(self, prompt: Prompt, recalled: Recalled, lease: Lease | None, longest: int) -> list[int]:
        """What all candidates follow. Raises PromptTooLong if the longest of them has no room behind it."""
        token_ids = await self._recaller.token_ids(prompt, recalled, lease)
        self._encoder.room(lease, len(token_ids) + longest - 1, 1)
        return token_ids

    async def _answer(self, text: str, index: int, end: bool) -> list[int]:
        token_ids = await self._encoder.encode_quoted(text)
        token_ids += self._eos if end else ()
        if not token_ids:
            raise InvalidPrompt("the candidate is empty; give at least one token", param=f"candidates.{index}")
        self._encoder.check_ids(token_ids, f"candidates.{index}")
        return token_ids
