"""Mixed load for a long time, with soft prompts that come and go and compressions: does anything grow?"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

import httpx
import psutil

from softbatch.scheduler.model.source import resolve
from tests.chaos.disconnects import come_and_go
from tests.chaos.engine_kills import register_soft_prompts
from tests.chaos.soak_plot import Sample, svg
from tests.chaos.stage import Finding, flags_of
from tests.support.mixed_requests import EMBEDDINGS, answer_of, is_error, mixed_requests
from tests.support.servers import Server, running_server
from tests.support.small_compressions import CONTEXT

SAMPLE_SECONDS = 5.0
# One that a busy machine has not made by then is cancelled: that too happens to servers.
LONGEST_COMPRESSION = 180.0
COMPRESSION = {"context": CONTEXT[:300], "virtual_tokens": 8, "answer_tokens": 8}


class Counts:
    """What was done, and what went wrong."""

    def __init__(self) -> None:
        self.answers = 0
        self.registrations = 0
        self.compressions = 0
        self.cancelled = 0
        self.errors: list[str] = []


def run(options: argparse.Namespace, folder: Path) -> list[Finding]:
    with running_server(folder, *flags_of(options)) as server:
        register_soft_prompts(server, resolve(options.model).path, folder)
        content = next(folder.rglob(f"{EMBEDDINGS}*.safetensors")).read_bytes()
        counts, samples = Counts(), list[Sample]()
        compression = COMPRESSION | ({"steps": 2} if options.tiny else {"minutes": 1})
        asyncio.run(soak(server, counts, samples, 60 * options.soak_minutes, content, compression))
        for prompt in server.http.get("/v1/soft_prompts").json()["data"]:
            server.http.delete(f"/v1/soft_prompts/{prompt['name']}")
        server.wait_empty()
    for error in counts.errors[:10]:
        print(f"  {error:.300}")
    if options.plot is not None:
        options.plot.write_text(svg(samples))
    done = f"{counts.answers} answers, {counts.registrations} registrations, {counts.compressions} compressions"
    done += f" ({counts.cancelled} more cancelled)"
    return [
        Finding(f"in {options.soak_minutes:g} minutes", "", done),
        Finding("errors", "0", str(len(counts.errors)), not counts.errors),
        flat("memory of the front end", [s.front_end_mib for s in samples], 48, "MiB"),
        flat("memory of the engine", [s.engine_mib for s in samples], 96, "MiB"),
        flat("open files", [s.files for s in samples], 8, ""),
        Finding("KV blocks in use when all is done", "0", "0", held=True),
    ]


def flat(what: str, values: Sequence[float], room: float, unit: str) -> Finding:
    """The last quarter beside the second: in the first, caches fill."""
    quarter = max(1, len(values) // 4)
    early, late = median(values[quarter : 2 * quarter]), median(values[-quarter:])
    measured = f"{late - early:+.0f} {unit} ({early:.0f} in the second quarter, {late:.0f} in the last)"
    return Finding(what, f"at most +{room:g} {unit}", measured, late - early <= room)


async def soak(
    server: Server,
    counts: Counts,
    samples: list[Sample],
    seconds: float,
    content: bytes,
    compression: Mapping[str, object],
) -> None:
    end = time.monotonic() + seconds
    async with server.async_http() as client:
        client.timeout = httpx.Timeout(None)
        jobs = [ask(client, counts, end, number) for number in range(4)]
        jobs += [register(client, counts, end, content), compress(client, counts, end, compression), leave(server, end)]
        await asyncio.gather(*jobs, watch(server, samples, end))


async def ask(client: httpx.AsyncClient, counts: Counts, end: float, number: int) -> None:
    """Requests of every kind, one after the other; each round begins with another."""
    requests = mixed_requests(90, 24)
    while time.monotonic() < end:
        for request in requests[number * 7 :]:
            answer = await answer_of(client, request)
            counts.answers += 1
            if is_error(answer):
                counts.errors.append(f"{request.route}: {answer}")
            if time.monotonic() > end:
                return


async def register(client: httpx.AsyncClient, counts: Counts, end: float, content: bytes) -> None:
    """A soft prompt comes under a new name, is used, and goes."""
    while time.monotonic() < end:
        name = f"soak-{counts.registrations}"
        reply = await client.post(
            "/v1/soft_prompts", data={"name": name}, files={"file": ("prompt.safetensors", content)}
        )
        used = await client.post("/v1/completions", json={"model": name, "prompt": "The sea", "max_tokens": 4})
        gone = await client.delete(f"/v1/soft_prompts/{name}")
        if (reply.status_code, used.status_code, gone.status_code // 100) != (201, 200, 2):
            counts.errors.append(f"{name}: {reply.text} {used.text} {gone.text}")
        counts.registrations += 1
        await asyncio.sleep(1)


async def compress(client: httpx.AsyncClient, counts: Counts, end: float, compression: Mapping[str, object]) -> None:
    while time.monotonic() < end:
        name = f"compressed-{counts.compressions}"
        reply = await client.post("/v1/compressions", json={"name": name, **compression})
        if reply.status_code != 202:
            counts.errors.append(f"{name}: {reply.text}")
            return
        place = reply.headers["location"]
        latest = min(end, time.monotonic() + LONGEST_COMPRESSION)
        while (job := (await client.get(place)).json())["status"] in ("queued", "running"):
            if time.monotonic() > latest:
                await client.post(f"{place}/cancel")
            await asyncio.sleep(1)
        if job["status"] not in ("succeeded", "cancelled"):
            counts.errors.append(f"{name}: {job}")
        counts.compressions += job["status"] == "succeeded"
        counts.cancelled += job["status"] == "cancelled"
        await client.delete(f"/v1/soft_prompts/{name}")
        await asyncio.sleep(20)


async def leave(server: Server, end: float) -> None:
    seed = 0
    while time.monotonic() < end:
        await come_and_go(server, 5, seed := seed + 1)
        await asyncio.sleep(10)


async def watch(server: Server, samples: list[Sample], end: float) -> None:
    front_end, engine = psutil.Process(server.process.pid), server.engine()
    began = time.monotonic()
    while time.monotonic() < end:
        blocks = await asyncio.to_thread(server.metric, "kv_usage_ratio")
        samples.append(
            Sample(
                (time.monotonic() - began) / 60,
                front_end.memory_info().rss / 2**20,
                engine.memory_info().rss / 2**20,
                front_end.num_fds() + engine.num_fds(),
                blocks,
            )
        )
        await asyncio.sleep(min(SAMPLE_SECONDS, max(0.0, end - time.monotonic())))
