"""A beat for all who watch the server live: what they see is made once for each beat, not once for each of them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Hashable
from dataclasses import dataclass, field

from softbatch.server.observability.history import SECONDS_BETWEEN_SAMPLES, History
from softbatch.server.observability.metrics import Metrics

BEAT_SECONDS = 0.2


@dataclass(frozen=True)
class Beat:
    """One moment. Who is shown the same as somebody else gets what was `made` for that one."""

    made: dict[Hashable, bytes] = field(default_factory=dict)

    def shared(self, key: Hashable, make: Callable[[], bytes]) -> bytes:
        if key not in self.made:
            self.made[key] = make()
        return self.made[key]


class LiveFeed:
    """Owns the history and the beat. The beat runs only while somebody watches; nothing here reaches the engine."""

    def __init__(self, metrics: Metrics, has_ended: Callable[[], bool]) -> None:
        self.history = History(metrics)
        self._has_ended = has_ended
        self._watchers = 0
        self._beating: asyncio.Task[None] | None = None
        self._next: asyncio.Future[Beat] | None = None

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[LiveFeed]:
        """Keep the history until the end of the block."""
        sampling = asyncio.create_task(self._keep_sampling())
        try:
            yield self
        finally:
            sampling.cancel()

    async def watch(self) -> AsyncGenerator[Beat, None]:
        """One beat at once, then each that comes; ends when the server does. Who is slow misses some."""
        yield Beat()
        self._watchers += 1
        if self._beating is None:
            self._next = asyncio.get_running_loop().create_future()
            self._beating = asyncio.create_task(self._beat())
        try:
            while not self._has_ended():
                assert self._next is not None
                # Shielded: one who leaves must not take the others' beat along.
                yield await asyncio.shield(self._next)
        finally:
            self._watchers -= 1
            if not self._watchers:
                self._beating.cancel()
                self._beating = self._next = None

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(BEAT_SECONDS)
            now, self._next = self._next, asyncio.get_running_loop().create_future()
            assert now is not None
            now.set_result(Beat())

    async def _keep_sampling(self) -> None:
        while True:
            await asyncio.sleep(SECONDS_BETWEEN_SAMPLES)
            self.history.take()
