"""One measurement, as the command and the benchmarks make it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import asdict, dataclass
from typing import Any

import uvloop

from softbatch.server.bench.client import Client, Target
from softbatch.server.bench.figures import Figures, Objective, figures_of
from softbatch.server.bench.load import Load, Plan
from softbatch.server.bench.processes import Cost, ProcessTree, machine_cpu_seconds
from softbatch.server.bench.workload import Requests

PATH = "/v1/completions"


@dataclass(frozen=True)
class Report:
    """What was asked, what came of it and what it cost; `server` is None for a server on another machine.

    Costs are over ramp and window together, `seconds` long.
    """

    requests: Requests
    plan: Plan
    figures: Figures
    seconds: float
    client_cpu_seconds: float
    server: Cost | None

    def as_json(self) -> dict[str, Any]:
        work = self.requests.workload
        return {
            "workload": asdict(work),
            "model": self.requests.model,
            "soft_prompt": self.requests.soft_prompt,
            "seed": self.requests.seed,
            "plan": asdict(self.plan),
            **asdict(self.figures),
            "loaded_seconds": self.seconds,
            "client_cpu_seconds": self.client_cpu_seconds,
            "server": asdict(self.server) if self.server else None,
        }


def measure(
    url: str,
    requests: Requests,
    plan: Plan,
    objective: Objective,
    *,
    api_key: str | None = None,
    pid: int | None = None,
) -> Report:
    """Put the load on the server at `url` and wait for the end. Raises ValueError for an impossible address."""
    target = Target.of(url, PATH, api_key)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_measure(target, requests, plan, objective, pid))


async def _measure(target: Target, requests: Requests, plan: Plan, objective: Objective, pid: int | None) -> Report:
    tree = ProcessTree(pid) if pid is not None else None
    used = tree.sample() if tree else 0.0
    watcher = asyncio.create_task(tree.watch()) if tree else None
    started, cpu, machine = time.perf_counter(), time.process_time(), machine_cpu_seconds()
    try:
        window = await Load(Client(target), requests, plan).run()
    finally:
        if watcher is not None:
            watcher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watcher
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    cost = None
    if tree is not None:
        used = tree.sample() - used
        cost = Cost(used, tree.peak_rss, max(0.0, machine_cpu_seconds() - machine - used - cpu))
    figures = figures_of(window, objective, by_events=plan.duration is not None)
    return Report(requests, plan, figures, seconds, cpu, cost)
