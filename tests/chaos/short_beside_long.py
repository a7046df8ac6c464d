"""Chats beside long prompts: how long their first token takes, and what that costs."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from softbatch.server.bench.client import Exchange
from tests.chaos.stage import Crowd, Finding, checked, first_token, flags_of, meanwhile, quantile, times
from tests.support.servers import Server, running_server

# The words of a prompt of 1,800 tokens, and those of one of 1,400 words.
STREAMED, LONG = 1350, 1400
# Seconds that one long prompt of each of eight clients takes, more or less, and those from one chat to the next.
ROUND, PAUSE = 5.0, 0.8
# Chats that were beside long prompts all the while: fewer say nothing.
LEAST = 5


@dataclass
class Side:
    """What one server showed in all rounds."""

    alone: list[float] = field(default_factory=list)
    beside: list[float] = field(default_factory=list)
    tokens: float = 0.0
    seconds: float = 0.0  # of the engine's processor time


def run(options: argparse.Namespace, folder: Path) -> list[Finding]:
    """Two servers in turn, so that both see the same minutes: one as it is, the other with steps of any length. They
    get the same work, as a token of an answer costs more than one of a prompt."""
    with contextlib.ExitStack() as stack:
        servers = []
        for name, flags in (("bounded", ()), ("whole", ("--step-target", "3600"))):
            (folder / name).mkdir()
            servers.append(stack.enter_context(running_server(folder / name, *flags_of(options), *flags, env=THREADS)))
        bounded, whole, stream = Side(), Side(), Side()
        for _ in range(options.rounds):
            for server, side in zip(servers, (bounded, whole), strict=True):
                asyncio.run(beside_eight(server, side, options.seconds))
            asyncio.run(beside_a_stream(servers[0], stream, options.seconds))
    first, before = quantile(bounded.beside, 0.5), quantile(whole.beside, 0.5)
    alone, busy = quantile(stream.alone, 0.99), quantile(stream.beside, 0.99)
    throughput = (bounded.tokens / bounded.seconds) / (whole.tokens / whole.seconds)
    costs = f"{bounded.tokens:.0f} and {whole.tokens:.0f} tokens"
    return [
        Finding(
            "first token beside eight prompts of 1,400 words, median",
            "at most 0.5 s",
            f"{first:.3f} s (alone {quantile(bounded.alone, 0.5):.3f}; in steps of any length {before:.3f})",
            first <= 0.5,
        ),
        Finding(
            "tokens per second of the processor, to steps of any length",
            "at least 0.95 ×",
            f"{throughput:.2f} × ({costs})",
            throughput >= 0.95,
        ),
        times(busy / alone, 3, "first token beside a stream of 1,800 tokens, p99", f"{busy:.3f} s to {alone:.3f} s"),
    ]


THREADS = {"OMP_NUM_THREADS": "2"}


async def beside_eight(server: Server, side: Side, seconds: float) -> None:
    """Eight clients ask for long prompts one after the other, all as many, and chats come meanwhile. Those count that
    ended before the last long prompt did."""
    crowd = Crowd(server)
    long, chats = list[Exchange](), list[Exchange]()
    rounds = max(2, round(seconds / ROUND))

    async def ask_long() -> None:
        for _ in range(rounds):
            long.append(checked(await crowd.ask(LONG, 64)))

    async def chat(number: int) -> None:
        await asyncio.sleep(1 + PAUSE * number)
        chats.append(checked(await crowd.ask(8, 20)))

    with contextlib.closing(crowd):
        side.alone += map(first_token, await crowd.chats(seconds / 4, 8, 20))
        tokens, used = await asyncio.to_thread(work_of, server)
        await asyncio.gather(*(ask_long() for _ in range(8)), *map(chat, range(int((rounds - 1) * ROUND / PAUSE))))
        tokens_after, used_after = await asyncio.to_thread(work_of, server)
    beside = beside_all_the_while(chats, long)
    assert len(beside) >= LEAST, f"only {len(beside)} of {len(chats)} chats ended beside long prompts: --seconds longer"
    side.beside += map(first_token, beside)
    side.tokens += tokens_after - tokens
    side.seconds += used_after - used
    await asyncio.to_thread(server.wait_empty)


def beside_all_the_while(chats: Sequence[Exchange], long: Sequence[Exchange]) -> list[Exchange]:
    """The chats that ended before the last of the long prompts."""
    end = max(exchange.ended or 0.0 for exchange in long)
    return [chat for chat in chats if chat.ended is not None and chat.ended < end]


async def beside_a_stream(server: Server, side: Side, seconds: float) -> None:
    """Long prompts come one by one, and chats in between and beside."""
    crowd = Crowd(server)
    with contextlib.closing(crowd):

        async def ask_long() -> None:
            checked(await crowd.ask(STREAMED, 1))
            await asyncio.sleep(0.1)

        side.alone += map(first_token, await crowd.chats(seconds, 20, 8))
        async with meanwhile(1, ask_long):
            side.beside += map(first_token, await crowd.chats(seconds, 20, 8))
    await asyncio.to_thread(server.wait_empty)


def work_of(server: Server) -> tuple[float, float]:
    """Tokens computed so far, and processor seconds of the engine."""
    used = server.engine().cpu_times()
    return server.metric("iteration_tokens_sum"), used.user + used.system
