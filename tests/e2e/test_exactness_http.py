"""Greedy text over HTTP equals plain transformers, with little room, soft prompts of both kinds, and clients that
leave in the middle."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from softbatch.prompt_store.soft_prompt_file import SoftPrompt
from softbatch.scheduler.model.loader import spec_of
from tests.e2e.conftest import BLOCK_BYTES
from tests.support.engines import trained_like
from tests.support.models import Reference, sample_texts, save_prompt
from tests.support.servers import Server, wait_for

NUM_WHOLE = 24
NUM_LEAVING = 8
SOFT_PROMPTS = {"exact-embeddings": ("embeddings", 20), "exact-kv": ("kv", 33)}


@dataclass(frozen=True)
class Ask:
    text: str
    max_tokens: int
    soft_prompt: str | None
    streamed: bool
    leaves_after: int | None = None  # events of the stream

    @property
    def body(self) -> dict[str, Any]:
        body = {"prompt": self.text, "max_tokens": self.max_tokens, "temperature": 0, "stream": self.streamed}
        return body | ({"soft_prompt": self.soft_prompt} if self.soft_prompt else {})


@pytest.fixture(scope="module")
def soft_prompts(
    smollm2_server: Server, smollm2: Reference, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str | None, SoftPrompt | None]]:
    """What the first tokens of a real text leave behind, in both kinds."""
    directory = tmp_path_factory.mktemp("soft-prompts")
    spec = spec_of("smollm2-135m", smollm2.model, smollm2.tokenizer)
    prompts = {name: trained_like(kind, n, smollm2, spec) for name, (kind, n) in SOFT_PROMPTS.items()}
    for name, prompt in prompts.items():
        assert smollm2_server.upload(name, save_prompt(prompt, directory, name)).status_code == 201
    yield {None: None, **prompts}
    for name in prompts:
        smollm2_server.http.delete(f"/v1/soft_prompts/{name}")


def make_asks() -> list[Ask]:
    """Short and long answers to short and long prompts; those who leave had asked for a long answer.

    Six come first that all run at once and need four blocks each in the end: more than the thirteen there are.
    """
    rng = random.Random(11)
    growing = [Ask(text, 58, None, streamed=False) for text in ("The sea:", "Winter:", "Rain:")] * 2
    asks = []
    for index, text in enumerate(sample_texts(NUM_WHOLE)):
        soft_prompt = [None, *SOFT_PROMPTS][index % 3]
        asks.append(Ask(text, 26 if index % 5 < 2 else 5, soft_prompt, streamed=bool(index % 2)))
    long = [ask for ask in asks if ask.max_tokens == 26]
    asks += [replace(ask, streamed=True, leaves_after=rng.randrange(5)) for ask in long[:NUM_LEAVING]]
    rng.shuffle(asks)
    return growing + asks


async def ask_all(server: Server, asks: list[Ask]) -> list[str]:
    async with server.async_http() as client:
        return await asyncio.gather(*(ask_one(client, ask) for ask in asks))


async def ask_one(client: httpx.AsyncClient, ask: Ask) -> str:
    """The text that came; of a client that leaves, what came until then."""
    if not ask.streamed:
        reply = await client.post("/v1/completions", json=ask.body)
        assert reply.status_code == 200, reply.text
        return str(reply.json()["choices"][0]["text"])
    pieces: list[str] = []
    async with client.stream("POST", "/v1/completions", json=ask.body) as reply:
        assert reply.status_code == 200, await reply.aread()
        if ask.leaves_after == 0:
            return ""
        async for line in reply.aiter_lines():
            if not line or line.startswith(":"):
                continue
            event = line.removeprefix("data: ")
            if event == "[DONE]":
                break
            pieces.append(json.loads(event)["choices"][0]["text"])
            if len(pieces) == ask.leaves_after:
                break
    return "".join(pieces)


def right_text(reference: Reference, ask: Ask, soft_prompt: SoftPrompt | None, answer: str) -> str:
    """What transformers answers; quickly found if the tokens of `answer` are it."""
    guess = reference.tokenizer(answer, add_special_tokens=False)["input_ids"]
    if len(guess) < ask.max_tokens:
        guess.append(reference.model.generation_config.eos_token_id)
    ids = reference.tokenizer(ask.text)["input_ids"]
    output = reference.generate(ids, ask.max_tokens, soft_prompt, guess=guess)
    return str(reference.tokenizer.decode(output, skip_special_tokens=True))


def test_mixed_batches(
    smollm2_server: Server, smollm2: Reference, soft_prompts: dict[str | None, SoftPrompt | None]
) -> None:
    server = smollm2_server
    asks = make_asks()
    before = server.metrics("preemptions_total", "requests_finished_total")
    expected: dict[tuple[str, str | None], str] = {}
    rounds = 0
    # How requests meet in the batch is up to the clock; several rounds make sure that some are preempted.
    while rounds < 5 and server.metric("preemptions_total") == before[0]:
        rounds += 1
        answers = asyncio.run(ask_all(server, asks))
        for ask, answer in sorted(zip(asks, answers, strict=True), key=lambda pair: pair[0].leaves_after is not None):
            question = (ask.text, ask.soft_prompt)
            if question not in expected:
                expected[question] = right_text(smollm2, ask, soft_prompts[ask.soft_prompt], answer)
            right = expected[question]
            if ask.leaves_after is None:
                assert answer == right, ask
            else:
                assert right.startswith(answer), ask
        server.wait_idle()
    preempted, finished = server.metrics("preemptions_total", "requests_finished_total")
    assert preempted > before[0], "nothing was preempted: the KV cache is too large for this test"
    assert finished - before[1] == rounds * len(asks)
    # Prompts longer than the budget of 24 tokens were cut: no step was larger than that.
    assert max(len(smollm2.tokenizer(ask.text)["input_ids"]) for ask in asks) > 32
    steps = server.metric("iteration_tokens_count")
    assert steps == server.metric("iteration_tokens_bucket", le="32.0") > 0


def test_nothing_is_left_but_the_soft_prompts(
    smollm2_server: Server, soft_prompts: dict[str | None, SoftPrompt | None], tmp_path: Path
) -> None:
    server = smollm2_server
    for name in SOFT_PROMPTS:
        server.complete("The sea", 2, soft_prompt=name)

    def only_soft_prompts() -> bool:
        ratio, blocks, resident = server.metrics("kv_usage_ratio", "kv_blocks", "soft_prompts_resident_bytes")
        return server.is_idle and round(ratio * blocks) * BLOCK_BYTES == resident > 0

    wait_for(only_soft_prompts, "KV blocks are in use by nobody")
    for name in SOFT_PROMPTS:
        assert server.http.delete(f"/v1/soft_prompts/{name}").status_code == 200
    server.wait_empty()
