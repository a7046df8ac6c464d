"""Replicas that come and go while requests run: by hand, by load, by what a first token takes, and as a new version."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import httpx

from benchmarks.scaling.ray_requests import ask, body_of, replicas, until

CLIENTS, FEW = 8, 1
# Of Serve's scaling, so that minutes are enough to see it.
SOON = {"replica_cpus": 0.9, "min_replicas": 1, "max_replicas": 2, "scale_up_after": 2, "scale_down_after": 5}


class _Deploys(Protocol):
    @property
    def url(self) -> str: ...

    def deploy(self, count: int, settings: dict[str, Any] | None = None, **cluster_settings: Any) -> None: ...


class ScalingParts:
    """Each part tells how many replicas there were, and what became of the requests."""

    def scale(self: _Deploys) -> dict[str, Any]:
        self.deploy(1)
        seen = [len(replicas())]

        async def scaled(_: Clients) -> None:
            for count in (2, 1):
                await asyncio.to_thread(self.deploy, count)
                await until(lambda count=count: len(replicas()) == count)
                seen.append(len(replicas()))
                await asyncio.sleep(5)

        return {"replicas": seen, "outcomes": _under_load(self.url, scaled)}

    def autoscale(self: _Deploys) -> dict[str, Any]:
        """2 unfinished requests are aimed at for each replica; 8 clients come, and 7 of them go."""
        self.deploy(1, target_requests=2, **SOON)
        return _come_and_go(self.url)

    def first_token(self: _Deploys) -> dict[str, Any]:
        """However many requests there are: with 4 slots, half of 8 clients wait for one."""
        self.deploy(1, {"max_batch_size": 4}, target_requests=1000, target_first_token=0.5, **SOON)
        return _come_and_go(self.url)

    def update(self: _Deploys) -> dict[str, Any]:
        """Two replicas, and another setting for them."""
        self.deploy(2, {"default_max_tokens": 100})
        before = {process.pid for process in replicas()}

        async def updated(_: Clients) -> None:
            await asyncio.to_thread(self.deploy, 2, {"default_max_tokens": 200})
            await until(lambda: len(replicas()) == 2 and not before & {process.pid for process in replicas()})
            await asyncio.sleep(5)

        outcomes = _under_load(self.url, updated)
        limit = httpx.get(f"{self.url}/info", timeout=30).json()
        return {
            "outcomes": outcomes,
            "all_replaced": not before & {process.pid for process in replicas()},
            "info": limit,
        }


class Clients:
    """`wanted` of them ask, one request after another."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self.wanted = CLIENTS
        self.outcomes: Counter[str] = Counter()
        self._http = http

    async def ask_on(self, number: int) -> None:
        at = number
        while self.wanted:
            if number >= self.wanted:
                await asyncio.sleep(0.2)
                continue
            answer = await ask(self._http, body_of(at), asyncio.Event())
            self.outcomes["failed" if answer is None else "answered"] += 1
            at += CLIENTS


def _come_and_go(url: str) -> dict[str, Any]:
    seen, began = [(0.0, len(replicas()))], time.monotonic()

    async def come_and_go(clients: Clients) -> None:
        for wanted, count in ((CLIENTS, 2), (FEW, 1)):
            clients.wanted = wanted
            await until(lambda count=count: len(replicas()) == count)
            seen.append((round(time.monotonic() - began), len(replicas())))

    return {"seconds_and_replicas": seen, "outcomes": _under_load(url, come_and_go)}


def _under_load(url: str, work: Callable[[Clients], Awaitable[None]]) -> dict[str, int]:
    async def run() -> dict[str, int]:
        async with httpx.AsyncClient(base_url=url, timeout=None) as http:
            clients = Clients(http)
            asking = [asyncio.create_task(clients.ask_on(number)) for number in range(CLIENTS)]
            try:
                await work(clients)
            finally:
                clients.wanted = 0
                await asyncio.gather(*asking)
            return dict(clients.outcomes)

    return asyncio.run(run())
