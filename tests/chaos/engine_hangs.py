"""Stops the engine for good under a mixed load, by itself and while the server is told to end."""

from __future__ import annotations

import argparse
import asyncio
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from softbatch.scheduler.model.source import resolve
from softbatch.server.requests.watchdog import TICK_SECONDS
from tests.chaos.engine_kills import beside_undisturbed, register_soft_prompts
from tests.chaos.stage import Finding
from tests.support.mixed_requests import MixedRequest, answers_of, mixed_requests
from tests.support.servers import Server, running_server, wait_for

STEP_TIMEOUT, DRAIN_TIMEOUT = 10, 180
# Of the answers, when the engine stops.
PART = 0.3


def run(options: argparse.Namespace, folder: Path) -> list[Finding]:
    flags = ["--model", options.model, "--dtype", options.dtype, "--max-queue-size", str(4 * options.requests)]
    flags += ["--step-timeout", str(STEP_TIMEOUT), "--drain-timeout", str(DRAIN_TIMEOUT)]
    with running_server(folder, *flags) as server:
        register_soft_prompts(server, resolve(options.model).path, folder)
        requests = mixed_requests(options.requests, options.max_tokens)
        before = server.metric("generation_tokens_total")
        expected = asyncio.run(answers_of(server, requests))
        moment = PART * (server.metric("generation_tokens_total") - before)
        noticed, answers = asyncio.run(stopped_at(server, requests, moment))
        ended, last_answers = asyncio.run(stopped_at(server, requests, moment, told_to_end=True))
        status = server.wait_exit()
    most = STEP_TIMEOUT + 2 * TICK_SECONDS
    return [
        Finding("an engine stopped for good is gone after", f"at most {most:g} s", f"{noticed:.1f} s", noticed <= most),
        *beside_undisturbed(requests, expected, answers),
        Finding(
            "told to end in that state, the server is gone after",
            f"at most {DRAIN_TIMEOUT} s",
            f"{ended:.1f} s, with status {status}",
            ended <= DRAIN_TIMEOUT and status == 0,
        ),
        *beside_undisturbed(requests, expected, last_answers),
    ]


async def stopped_at(
    server: Server, requests: Sequence[MixedRequest], moment: float, *, told_to_end: bool = False
) -> tuple[float, list[Any]]:
    """The seconds until the stopped engine is gone, or the server that was told to end, and the answers."""
    before = await asyncio.to_thread(server.metric, "generation_tokens_total")
    asked = asyncio.create_task(answers_of(server, requests))
    while await asyncio.to_thread(server.metric, "generation_tokens_total") - before < moment:
        assert not asked.done(), "all is answered before the engine stops"
        await asyncio.sleep(0.05)
    engine = server.engine()
    engine.send_signal(signal.SIGSTOP)
    since = time.monotonic()
    if told_to_end:
        server.process.send_signal(signal.SIGTERM)
        await asyncio.to_thread(server.wait_exit)
    else:
        await asyncio.to_thread(wait_for, lambda: not engine.is_running(), "the engine is not given up")
    return time.monotonic() - since, await asked
