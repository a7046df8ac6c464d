"""Two API keys, one of which sends fifty times as much: what the other notices."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
from pathlib import Path

from tests.chaos.stage import Crowd, Finding, checked, flags_of, meanwhile, quantile, times, whole
from tests.support.servers import Server, running_server

LIGHT, HEAVY, HEAVY_CLIENTS = "light-key", "heavy-key", 50


def run(options: argparse.Namespace, folder: Path) -> list[Finding]:
    keys = ("--api-key", LIGHT, "--api-key", HEAVY)
    alone: list[float] = []
    beside: list[float] = []
    with running_server(folder, *flags_of(options), *keys, env={"OMP_NUM_THREADS": "2"}) as server:
        for _ in range(options.rounds):
            asyncio.run(measure(server, alone, beside, options.seconds))
    one, other = quantile(alone, 0.5), quantile(beside, 0.5)
    detail = f"{other:.2f} s to {one:.2f} s, {len(beside)} and {len(alone)} chats"
    return [times(other / one, 2, "a light key's latency beside one that sends 50 times as much, median", detail)]


async def measure(server: Server, alone: list[float], beside: list[float], seconds: float) -> None:
    light, heavy = Crowd(server, LIGHT), Crowd(server, HEAVY)
    with contextlib.closing(light), contextlib.closing(heavy):

        async def ask_much() -> None:
            checked(await heavy.ask(40, 32))

        alone += map(whole, await light.chats(seconds, 40, 32))
        async with meanwhile(HEAVY_CLIENTS, ask_much):
            await asyncio.sleep(1)
            beside += map(whole, await light.chats(seconds, 40, 32))
    await asyncio.to_thread(server.wait_empty)
