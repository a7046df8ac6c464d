"""Clients that go away at any moment of a request: nothing of them may stay."""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from softbatch.scheduler.model.source import resolve
from tests.chaos.engine_kills import register_soft_prompts
from tests.chaos.stage import Finding, flags_of
from tests.support.mixed_requests import mixed_requests
from tests.support.servers import Server, running_server


@dataclass(frozen=True)
class Held:
    """What a server holds for requests; nothing when it is idle."""

    requests: float
    blocks: float
    leases: int
    connections: float
    files: int


def run(options: argparse.Namespace, folder: Path) -> list[Finding]:
    with running_server(folder, *flags_of(options)) as server:
        register_soft_prompts(server, resolve(options.model).path, folder)
        return leave_at_random(server, options.clients, options.seed)


def leave_at_random(server: Server, clients: int, seed: int) -> list[Finding]:
    """Requests of every kind, of which each client sends a part or all, and reads some of the answer or nothing. The
    server's soft prompts are deleted at the end: whoever still held one would keep its file and its blocks."""
    asyncio.run(come_and_go(server, 20, seed + 1))  # what is made once, and kept, is there
    answer = server.complete("The sea", 4)
    before = settled(server)
    asyncio.run(come_and_go(server, clients, seed))
    for prompt in server.http.get("/v1/soft_prompts").json()["data"]:
        assert server.http.delete(f"/v1/soft_prompts/{prompt['name']}").status_code < 300
    same = server.complete("The sea", 4) == answer
    after = settled(server, empty=True)
    return [
        Finding(
            f"requests, share of blocks, leases after {clients} clients that left",
            "0, 0, 0",
            f"{after.requests:.0f}, {after.blocks:g}, {after.leases}",
            is_empty(after),
        ),
        Finding("open files", f"at most {before.files}", str(after.files), after.files <= before.files),
        Finding("connections", "1", f"{after.connections:.0f}", after.connections <= 1),
        Finding("an answer afterwards", "the same", "the same" if same else "another", same),
    ]


def is_empty(held: Held) -> bool:
    return (held.requests, held.blocks, held.leases) == (0, 0, 0)


def settled(server: Server, *, empty: bool = False) -> Held:
    """As soon as all is given back, or what is left after a while."""
    for _ in range(300):
        held = held_by(server)
        if held.requests == 0 and held.connections <= 1 and (is_empty(held) or not empty):
            break
        time.sleep(0.2)
    return held


def held_by(server: Server) -> Held:
    waiting, running, blocks, connections = server.metrics(
        "requests_waiting", "requests_running", "kv_usage_ratio", "connections"
    )
    leases = [path for path in server.store.glob(".leases-*/*") if path.is_file() and not path.name.startswith(".")]
    files = psutil.Process(server.process.pid).num_fds() + server.engine().num_fds()
    return Held(waiting + running, blocks, len(leases), connections, files)


async def come_and_go(server: Server, clients: int, seed: int) -> None:
    rng = random.Random(seed)
    requests = mixed_requests(clients, 40)
    limit = asyncio.Semaphore(40)

    async def client(route: str, body: dict[str, object]) -> None:
        payload = json.dumps(body).encode()
        head = f"POST {route} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(payload)}"
        message = head.encode() + b"\r\n\r\n" + payload
        moment = rng.choice(("head", "body", "wait", "read"))
        cut = {"head": rng.randrange(1, len(head)), "body": rng.randrange(len(head), len(message))}
        async with limit:
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(message[: cut.get(moment, len(message))])
            if moment == "wait":
                await asyncio.sleep(rng.uniform(0, 0.5))
            elif moment == "read":
                await reader.read(rng.choice((1, 200, 2000)))
            if rng.random() < 0.5:
                writer.transport.abort()
            else:
                writer.close()

    await asyncio.gather(*(client(request.route, request.body) for request in requests))
