"""Kills the engine at random moments under a mixed load, and counts what clients notice."""

from __future__ import annotations

import argparse
import asyncio
import random
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from softbatch.scheduler.model.loader import spec_of
from softbatch.scheduler.model.source import resolve
from tests.chaos.stage import Finding
from tests.support.engines import trained_like
from tests.support.mixed_requests import (
    EMBEDDINGS,
    KEYS_AND_VALUES,
    MixedRequest,
    answers_of,
    difference,
    is_error,
    mixed_requests,
)
from tests.support.models import load_reference, save_prompt
from tests.support.servers import Server, running_server, wait_for

SOFT_PROMPT_TOKENS = 33
# In float32, what the order of additions in another batch may change of a log-probability.
LOGPROB_TOLERANCE = 1e-3


def run(options: argparse.Namespace, folder: Path) -> list[Finding]:
    started = time.monotonic()
    # The load comes at once, and its choices and candidates take a place each.
    flags = ("--model", options.model, "--dtype", options.dtype, "--max-queue-size", str(4 * options.requests))
    with running_server(folder, *flags) as server:
        start_seconds = time.monotonic() - started
        register_soft_prompts(server, resolve(options.model).path, folder)
        requests = mixed_requests(options.requests, options.max_tokens)
        before = server.metric("generation_tokens_total")
        expected = asyncio.run(answers_of(server, requests))
        tokens = server.metric("generation_tokens_total") - before
        rng = random.Random(options.seed)
        moments = sorted(rng.uniform(0.02, 0.9) * tokens for _ in range(options.kills))
        answers = asyncio.run(killed_at(server, requests, moments))
        return compare(server, requests, expected, answers, start_seconds)


def register_soft_prompts(server: Server, path: str, folder: Path) -> None:
    reference = load_reference(path)
    spec = spec_of(server.http.get("/v1/models").json()["data"][0]["id"], reference.model, reference.tokenizer)
    for name, kind in ((EMBEDDINGS, "embeddings"), (KEYS_AND_VALUES, "kv")):
        prompt = trained_like(kind, SOFT_PROMPT_TOKENS, reference, spec)
        reply = server.upload(name, save_prompt(prompt, folder, name))
        assert reply.status_code == 201, reply.text


async def killed_at(server: Server, requests: Sequence[MixedRequest], moments: Sequence[float]) -> list[Any]:
    """The answers, while the engine is killed each time so many tokens have been generated."""
    asked = asyncio.create_task(answers_of(server, requests))
    before = await asyncio.to_thread(server.metric, "generation_tokens_total")
    for moment in moments:
        while await asyncio.to_thread(server.metric, "generation_tokens_total") - before < moment:
            if asked.done():
                return asked.result()
            await asyncio.sleep(0.05)
        await asyncio.to_thread(kill_and_await_another, server)
    return await asked


def kill_and_await_another(server: Server) -> None:
    restarts = server.metric("engine_restarts_total")
    server.engine().send_signal(signal.SIGKILL)
    wait_for(lambda: server.metric("engine_restarts_total") > restarts, "no other engine is started", 300)


def compare(
    server: Server, requests: Sequence[MixedRequest], expected: Sequence[Any], answers: Sequence[Any], start: float
) -> list[Finding]:
    deaths, resumed = server.metrics("engine_restarts_total", "requests_resumed_total")
    pause = server.metric("engine_pause_seconds_sum") / max(deaths, 1)
    return [
        Finding("requests, and engines killed under them", "", f"{len(requests)}, {deaths:.0f}"),
        *beside_undisturbed(requests, expected, answers),
        Finding("requests resumed", "", f"{resumed:.0f}"),
        Finding("pause per death", "", f"{pause:.1f} s (a start of the server: {start:.1f} s)"),
    ]


def beside_undisturbed(
    requests: Sequence[MixedRequest], expected: Sequence[Any], answers: Sequence[Any]
) -> list[Finding]:
    """What clients noticed."""
    errors = [answer for answer in answers if is_error(answer)]
    pairs = [(*both, request) for *both, request in zip(answers, expected, requests, strict=True)]
    changed = [
        (request.route, found)
        for answer, right, request in pairs
        if not is_error(answer) and (found := difference(answer, right, LOGPROB_TOLERANCE))
    ]
    for line in [*map(str, errors), *(f"{route}: {found}" for route, found in changed)]:
        print(f"  {line:.400}")
    undisturbed = sum(map(is_error, expected))
    return [
        Finding("errors", "0", f"{len(errors)} (undisturbed: {undisturbed})", not errors),
        Finding("changed outputs", "0", str(len(changed)), not changed),
    ]
