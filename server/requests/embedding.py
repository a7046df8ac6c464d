"""Texts as vectors: the model's last hidden states, pooled."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from softbatch.scheduler.protocol import Pooling, SamplingParams
from softbatch.server.request_failures import InvalidPrompt
from softbatch.server.requests.active_request import ActiveRequest
from softbatch.server.requests.admission import Admission, Places
from softbatch.server.requests.leases import Lease
from softbatch.server.requests.prompt_encoder import LONG_TEXT, Prompt, PromptEncoder


@dataclass(frozen=True)
class EmbeddingOrder:
    """What a route asks for; the fields are those of a `GenerationRequest`."""

    inputs: Sequence[Prompt]
    pooling: Pooling
    soft_prompt: str | None = None
    add_special_tokens: bool = True
    priority: int = 0
    cache_salt: str = ""
    user: str = ""
    timeout: float | None = None
    route: str = ""


@dataclass(frozen=True)
class Embeddings:
    """One vector for each input, as long as the model's hidden states. `prompt_tokens` counts the virtual ones too."""

    vectors: tuple[list[float], ...]
    prompt_tokens: int


class Embedder:
    """Embeds texts as requests like any other: queued, batched, preempted, cancelled when the caller leaves.

    No caller has more than `at_once` of them inside at a time, so that thousands of texts leave room for others.
    """

    def __init__(self, admission: Admission, encoder: PromptEncoder, at_once: int) -> None:
        self._admission = admission
        self._encoder = encoder
        self._at_once = at_once

    async def embed(self, order: EmbeddingOrder) -> Embeddings:
        """Every input is checked before the first is computed. Raises Failure."""
        first = min(self._at_once, len(order.inputs))
        with self._admission.reserve(first, order.timeout, order.user) as places:
            lease = await places.lease(order.soft_prompt)
            prompts = await self._all_token_ids(order, lease)
            requests = self._prepare(order, prompts[:first], lease, places)
        try:
            outputs = await self._admission.run(requests)
            for start in range(first, len(prompts), self._at_once):
                wave = prompts[start : start + self._at_once]
                await self._admission.until_room(len(wave))
                with self._admission.reserve(len(wave), user=order.user, deadline=places.deadline) as more:
                    requests = self._prepare(order, wave, lease, more)
                outputs += await self._admission.run(requests)
        finally:
            self._admission.release(lease)
        virtual = lease.ref.num_virtual_tokens if lease else 0
        tokens = sum(map(len, prompts)) + virtual * len(prompts)
        return Embeddings(tuple(output.embedding or [] for output in outputs), tokens)

    async def _all_token_ids(self, order: EmbeddingOrder, lease: Lease | None) -> list[list[int]]:
        """In a thread of their own if they are long together, so that others do not wait for all of them."""

        async def each() -> list[list[int]]:
            return [await self._token_ids(order, index, lease) for index in range(len(order.inputs))]

        if sum(len(text) for text in order.inputs if isinstance(text, str)) <= LONG_TEXT:
            return await each()
        return await asyncio.to_thread(lambda: asyncio.run(each()))

    async def _token_ids(self, order: EmbeddingOrder, index: int, lease: Lease | None) -> list[int]:
        try:
            token_ids = await self._encoder.token_ids(order.inputs[index], lease, order.add_special_tokens)
            self._encoder.room(lease, len(token_ids), 0)
        except InvalidPrompt as error:
            error.param = f"input.{index}" if len(order.inputs) > 1 else "input"
            raise
        return token_ids

    def _prepare(
        self, order: EmbeddingOrder, prompts: Sequence[list[int]], lease: Lease | None, places: Places
    ) -> list[ActiveRequest]:
        return [
            places.prepare(
                token_ids,
                SamplingParams(max_tokens=0),
                lease,
                route=order.route,
                priority=order.priority,
                cache_salt=order.cache_salt,
                score_from=len(token_ids),
                pooling=order.pooling,
            )
            for token_ids in prompts
        ]
