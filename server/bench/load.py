"""Load on a server: a closed loop of clients, or Poisson arrivals, and the window that is measured."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from softbatch.server.bench.client import Client, Exchange
from softbatch.server.bench.workload import Requests


@dataclass(frozen=True)
class Plan:
    """How much is asked: `concurrency` clients ask one after the other, or requests arrive `rate` a second.

    With `duration` a window of so many seconds is measured after a ramp, and what still runs then is cut off; the
    window closes earlier when `requests` have ended in it. Without, `requests` are sent and all of them waited for.
    """

    concurrency: int = 1
    rate: float | None = None
    requests: int | None = None
    duration: float | None = None
    max_ramp: float = 15.0


@dataclass
class Window:
    """What was measured: `exchanges` ended between `start` and `end`, and `events` came meanwhile."""

    start: float
    end: float
    events: int
    exchanges: list[Exchange]
    cut_off: int = 0

    @property
    def seconds(self) -> float:
        return self.end - self.start


@dataclass
class Load:
    """Runs one plan against one server."""

    client: Client
    requests: Requests
    plan: Plan
    _indices: Iterator[int] = field(default_factory=itertools.count)
    _exchanges: list[Exchange] = field(default_factory=list)
    _ended: int = 0
    _start: float = 0.0

    async def run(self) -> Window:
        """Raises whatever a client of ours raised; what goes wrong at the server is in the exchanges."""
        self._start = time.perf_counter()
        plan = self.plan
        workers = [self._arrivals()] if plan.rate else [self._worker(number) for number in range(plan.concurrency)]
        tasks = [asyncio.create_task(worker) for worker in workers]
        try:
            before = 0
            if plan.duration is None:
                await asyncio.gather(*tasks)
            else:
                await self._while_running(tasks, self._warm, plan.max_ramp)
                self._start, self._ended, before = time.perf_counter(), 0, self.client.counter.events
                await self._while_running(tasks, self._enough, plan.duration)
            end = time.perf_counter()
            ended = [e for e in self._exchanges if e.ended is not None and e.ended >= self._start]
            running = sum(1 for e in self._exchanges if e.ended is None)
            return Window(self._start, end, self.client.counter.events - before, ended, running)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self.client.close()

    async def _while_running(self, tasks: list[asyncio.Task[None]], stop: Callable[[], bool], seconds: float) -> None:
        deadline = time.perf_counter() + seconds
        while (left := deadline - time.perf_counter()) > 0 and not stop():
            done, _ = await asyncio.wait(tasks, timeout=min(left, 0.05), return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()

    def _warm(self) -> bool:
        """Every client has had its first token. Arrivals have no such moment: they ramp for as long as they may."""
        first = self._exchanges[: self.plan.concurrency]
        waiting = any(exchange.first is None and exchange.ended is None for exchange in first)
        return self.plan.rate is None and len(first) == self.plan.concurrency and not waiting

    def _enough(self) -> bool:
        return self.plan.requests is not None and self._ended >= self.plan.requests

    async def _worker(self, number: int) -> None:
        """One client of the closed loop."""
        if self.plan.duration is not None:
            # The first request is shorter, each client's by another amount: otherwise all would start and end
            # together for ever, and the window would show one phase of that.
            await self._ask(1 + number * self.requests.workload.output_tokens // self.plan.concurrency)
        while (index := self._next()) is not None:
            await self._ask(None, index)

    async def _arrivals(self) -> None:
        """Requests come by themselves, whether or not earlier ones have been answered."""
        async with asyncio.TaskGroup() as group:
            due = time.perf_counter()
            gaps = poisson_gaps(self.plan.rate or 1.0, self.requests.seed)
            while (index := self._next()) is not None:
                due += next(gaps)
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
                group.create_task(self._ask(None, index, due))

    def _next(self) -> int | None:
        """The next request to be made; without a window there are just so many."""
        index = next(self._indices)
        bounded = self.plan.duration is None and self.plan.requests is not None
        return None if bounded and index >= (self.plan.requests or 0) else index

    async def _ask(self, max_tokens: int | None, index: int | None = None, due: float | None = None) -> None:
        body = self.requests.body(next(self._indices) if index is None else index, max_tokens)
        wanted = self.requests.workload.output_tokens if max_tokens is None else max_tokens
        exchange = Exchange(time.perf_counter() if due is None else due, wanted)
        self._exchanges.append(exchange)
        await self.client.send(body, exchange)
        self._ended += 1
        if exchange.error is not None:
            await asyncio.sleep(0.1)  # a server that refuses at once must not be stormed


def poisson_gaps(rate: float, seed: int) -> Iterator[float]:
    """Seconds between the arrivals of a Poisson process, the same for the same seed."""
    draw = random.Random(f"arrivals/{seed}")
    while True:
        yield draw.expovariate(rate)
