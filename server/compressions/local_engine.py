"""The batched engine inside this process, without HTTP around it: gold answers and scores for the offline commands."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence

from softbatch.prompt_store.compression.evaluation.free_answers import Response
from softbatch.scheduler.engine.engine import Engine, build_engine
from softbatch.scheduler.protocol import (
    AddRequest,
    EngineConfig,
    ForgetSoftPrompt,
    Ready,
    SamplingParams,
    SoftPromptRef,
)
from softbatch.server.compressions.prepare import ModelFiles

SLOTS = 64
# What a question and the marks around it usually take; longer ones are preempted and come back.
QUESTION_TOKENS = 96
BLOCK_SIZE = 16
STEP_TOKENS = 1024
TIMED = 3  # prompts whose first token is timed
WIDEST_BYTES = 4  # of one element of the KV cache


class LocalEngine:
    """Runs requests to their end, many at a time; what they share at their start is computed once.

    The KV cache is as large as `longest` tokens and a full batch of answers need. Raises ModelError.
    """

    def __init__(self, files: ModelFiles, longest: int, max_answer_tokens: int, max_prompt_bytes: int) -> None:
        choice = files.choice
        tokens = longest + SLOTS * (QUESTION_TOKENS + max_answer_tokens) + 2 * BLOCK_SIZE
        config = EngineConfig(
            model=choice.model,
            served_model_name=choice.served_model_name,
            dtype=choice.dtype,
            device=choice.device,
            max_batch_size=SLOTS,
            max_batch_tokens=STEP_TOKENS,
            kv_cache_gib=WIDEST_BYTES * files.shape.elements_per_token * tokens / 2**30,
            block_size=BLOCK_SIZE,
            max_prompt_bytes=max_prompt_bytes,
        )
        self._engine: Engine
        self.ready: Ready
        self._engine, self.ready = build_engine(config, lambda name, seconds, detail: None, files.source)

    def close(self) -> None:
        self._engine.close()

    def generate(
        self, prompts: Sequence[Sequence[int]], max_tokens: int, stop_token_ids: Collection[int]
    ) -> list[list[int]]:
        """Greedy answers, each with the token that ended it. The first prompt goes ahead of the others, so that
        they find the KV of their common start. Raises ValueError for a prompt that does not fit."""
        return self._run([_greedy(index, ids, max_tokens, stop_token_ids) for index, ids in enumerate(prompts)])

    def respond(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        stop_token_ids: Collection[int],
        soft_prompt: SoftPromptRef | None,
    ) -> list[Response]:
        """The same behind a soft prompt. A few of the prompts are asked alone before, for the time to their first
        token, when the first of all has left what they share in the cache."""
        seconds: dict[int, float] = {}
        for index, ids in enumerate(prompts[: 1 + TIMED]):
            began = time.perf_counter()
            self._run([_greedy(0, ids, 1, stop_token_ids, soft_prompt)])
            if index:
                seconds[index] = time.perf_counter() - began
        wanted = [_greedy(index, ids, max_tokens, stop_token_ids, soft_prompt) for index, ids in enumerate(prompts)]
        answers = self._run(wanted)
        return [Response(ids, seconds.get(index)) for index, ids in enumerate(answers)]

    def forget(self, soft_prompt: SoftPromptRef) -> None:
        self._engine.handle(ForgetSoftPrompt(soft_prompt.sha256))

    def _run(self, requests: list[AddRequest]) -> list[list[int]]:
        """Their tokens, in their order. Raises ValueError."""
        answers: dict[str, list[int]] = {request.request_id: [] for request in requests}
        waiting = requests[:0:-1]
        for request in requests[:1]:
            self._engine.handle(request)
        while self._engine.has_work or waiting:
            for output in self._engine.step().outputs:
                _raise_error(output.error)
                answers[output.request_id] += output.token_ids
            if waiting and (answers["0"] or not self._engine.has_work):
                # Never more than the engine's queue holds.
                for _ in range(min(len(waiting), SLOTS - len(self._engine.scheduler.waiting))):
                    self._engine.handle(waiting.pop())
        return [answers[request.request_id] for request in requests]

    def score(
        self, shared: Sequence[int], candidates: Sequence[Sequence[int]], soft_prompt: SoftPromptRef | None
    ) -> list[list[float]]:
        """log Pr of each token of each candidate behind `shared`. Raises ValueError for what does not fit."""
        for index, candidate in enumerate(candidates):
            self._engine.handle(
                AddRequest(
                    request_id=str(index),
                    token_ids=[*shared, *candidate],
                    params=SamplingParams(max_tokens=0),
                    soft_prompt=soft_prompt,
                    score_from=len(shared),
                )
            )
        scores: dict[str, list[float]] = {}
        while self._engine.has_work:
            for output in self._engine.step().outputs:
                _raise_error(output.error)
                if output.scores is not None:
                    scores[output.request_id] = [score.logprob for score in output.scores]
        return [scores[str(index)] for index in range(len(candidates))]


def _greedy(
    index: int,
    ids: Sequence[int],
    max_tokens: int,
    stop_token_ids: Collection[int],
    soft_prompt: SoftPromptRef | None = None,
) -> AddRequest:
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0, stop_token_ids=tuple(sorted(stop_token_ids)))
    return AddRequest(request_id=str(index), token_ids=list(ids), params=params, soft_prompt=soft_prompt)


def _raise_error(error: str | None) -> None:
    if error is not None:
        raise ValueError(error)
