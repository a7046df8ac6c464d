"""What a server on this machine costs: processor seconds and memory of its whole process tree."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass

import psutil

SAMPLE_SECONDS = 0.5


@dataclass(frozen=True)
class Cost:
    """`others_cpu_seconds` is what this machine spent meanwhile on neither the server nor this process: where that is
    much, the figures say little about the server."""

    cpu_seconds: float
    peak_rss_bytes: int
    others_cpu_seconds: float


def machine_cpu_seconds() -> float:
    """Busy time of all cores, what a hypervisor took away included."""
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0))


def listening_on(port: int) -> int | None:
    """The process that listens on a port of this machine, if it can be told."""
    with contextlib.suppress(psutil.Error):
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port:
                return int(connection.pid) if connection.pid else None
    return None


class ProcessTree:
    """A process and all that it started; those that end meanwhile keep what they used until last seen."""

    def __init__(self, pid: int) -> None:
        self._root = psutil.Process(pid)
        self._used: dict[tuple[int, float], float] = {}
        self.peak_rss = 0

    def members(self) -> list[psutil.Process]:
        try:
            return [self._root, *self._root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def sample(self) -> float:
        """Processor seconds so far. Memory shared between the processes counts in each."""
        rss = 0
        for process in self.members():
            with contextlib.suppress(psutil.Error), process.oneshot():
                times = process.cpu_times()
                self._used[(process.pid, process.create_time())] = times.user + times.system
                rss += process.memory_info().rss
        self.peak_rss = max(self.peak_rss, rss)
        return sum(self._used.values())

    async def watch(self) -> None:
        """Sample until cancelled."""
        while True:
            self.sample()
            await asyncio.sleep(SAMPLE_SECONDS)
