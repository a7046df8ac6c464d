"""Two API keys, one of which sends fifty times as much: what the other notices."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
from collections.abc import Callable
from pathlib import Path

from softbatch.server.bench.client import Exchange
from tests.chaos.stage import (
    Crowd,
    Finding,
    checked,
    first_token,
    flags_of,
    meanwhile,
    per_token,
    quantile,
    times,
    whole,
)
from tests.support.servers import Server, running_server

LIGHT, HEAVY, HEAVY_CLIENTS = "light-key", "heavy-key", 50


def run(options: argparse.Namespace, folder: Path) -> list[Finding]:
    keys = ("--api-key", LIGHT, "--api-key", HEAVY)
    alone: list[Exchange] = []
    beside: list[Exchange] = []
    with running_server(folder, *flags_of(options), *keys, env={"OMP_NUM_THREADS": "2"}) as server:
        for _ in range(options.rounds):
            asyncio.run(measure(server, alone, beside, options.seconds))
    one, other = median_of(whole, alone), median_of(whole, beside)
    detail = f"{other:.2f} s to {one:.2f} s, {len(beside)} and {len(alone)} chats"
    parts = [
        Finding(what, "", f"{median_of(part, beside):.4f} s (alone {median_of(part, alone):.4f})")
        for what, part in (("of that to the first token", first_token), ("and per further token", per_token))
    ]
    return [
        times(other / one, 2, "a light key's latency beside one that sends 50 times as much, median", detail),
        *parts,
    ]


def median_of(part: Callable[[Exchange], float], chats: list[Exchange]) -> float:
    return quantile([part(chat) for chat in chats], 0.5)


async def measure(server: Server, alone: list[Exchange], beside: list[Exchange], seconds: float) -> None:
    light, heavy = Crowd(server, LIGHT), Crowd(server, HEAVY)
    with contextlib.closing(light), contextlib.closing(heavy):

        async def ask_much() -> None:
            checked(await heavy.ask(40, 32))

        alone += await light.chats(seconds, 40, 32)
        async with meanwhile(HEAVY_CLIENTS, ask_much):
            await asyncio.sleep(1)
            beside += await light.chats(seconds, 40, 32)
    await asyncio.to_thread(server.wait_empty)
