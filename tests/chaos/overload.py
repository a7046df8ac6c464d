"""Ten times as many requests as a server can serve: what those notice that it takes, and those that it refuses."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import time
from pathlib import Path

import psutil

from softbatch.server.bench.client import Exchange
from softbatch.server.bench.load import poisson_gaps
from tests.chaos.stage import Crowd, Finding, checked, flags_of, meanwhile, per_token, quantile, times, whole
from tests.support.servers import Server, running_server

SLOTS, TIMES = 8, 10
WORDS_OF_EACH, TOKENS_OF_EACH = 80, 64


def run(options: argparse.Namespace, folder: Path) -> list[Finding]:
    flags = ("--max-batch-size", str(SLOTS), "--max-queue-size", "2")
    with running_server(folder, *flags_of(options), *flags, env={"OMP_NUM_THREADS": "2"}) as server:
        return asyncio.run(measure(server, options.overload_seconds))


async def measure(server: Server, seconds: float) -> list[Finding]:
    crowd = Crowd(server)
    with contextlib.closing(crowd):
        full = await at_capacity(crowd, seconds / 2)
        rate = TIMES * len(full) / (seconds / 2)
        memory = resident(server)
        probes: list[float] = []
        asking = asyncio.create_task(overload(crowd, rate, seconds))
        while not asking.done():
            probes.append(await probe(server))
            await asyncio.sleep(0.2)
        exchanges = await asking
        await asyncio.to_thread(server.wait_empty)
        grown = resident(server) - memory
    taken = [e for e in exchanges if e.error is None]
    refused = [e for e in exchanges if (e.error or "").startswith("status 429")]
    broken = len(exchanges) - len(taken) - len(refused)
    pace, before = quantile([per_token(e) for e in taken], 0.99), quantile([per_token(e) for e in full], 0.99)
    refusal, alive = quantile([whole(e) for e in refused], 0.99), quantile(probes, 0.99)
    return [
        Finding("requests", "", f"{rate:.1f} a second for {seconds:.0f} s: {len(taken)} taken, {len(refused)} refused"),
        Finding("neither taken nor refused with 429", "0", str(broken), broken == 0),
        times(pace / before, 1.5, "time per output token, p99, to all slots busy", f"{pace:.4f} s to {before:.4f} s"),
        Finding(
            "answers a second", "", f"{len(taken) / seconds:.1f} (all slots busy: {len(full) / (seconds / 2):.1f})"
        ),
        Finding(
            "a refusal, p99",
            "under 0.05 s",
            f"{refusal:.3f} s (median {quantile([whole(e) for e in refused], 0.5):.4f}; "
            f"a probe of /health/live, p99: {alive:.3f})",
            refusal < 0.05,
        ),
        Finding("memory", "flat", f"{grown / 2**20:+.0f} MiB", grown < 64 << 20),
    ]


async def at_capacity(crowd: Crowd, seconds: float) -> list[Exchange]:
    """As many clients as slots, for so long; those that ended."""
    ended: list[Exchange] = []

    async def ask() -> None:
        ended.append(checked(await crowd.ask(WORDS_OF_EACH, TOKENS_OF_EACH)))

    async with meanwhile(SLOTS, ask):
        await asyncio.sleep(seconds)
    return list(ended)


async def overload(crowd: Crowd, rate: float, seconds: float) -> list[Exchange]:
    """Requests come by themselves, however many are still being answered."""
    gaps, due = poisson_gaps(rate, 0), time.perf_counter()
    end = due + seconds
    asked: list[asyncio.Task[Exchange]] = []
    while (due := due + next(gaps)) < end:
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        asked.append(asyncio.create_task(crowd.ask(WORDS_OF_EACH, TOKENS_OF_EACH)))
    return list(await asyncio.gather(*asked))


async def probe(server: Server) -> float:
    """Seconds of an answer that costs nothing: what the machine itself makes of one."""
    began = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(b"GET /health/live HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
    await reader.read()
    writer.close()
    return time.perf_counter() - began


def resident(server: Server) -> int:
    """Bytes of the front end and of the engine."""
    front_end = psutil.Process(server.process.pid)
    return sum(process.memory_info().rss for process in (front_end, server.engine()))
