"""What the scenarios share: chats whose moments are noted, and findings, each beside what was asked for."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import msgspec

from softbatch.server.bench.client import Client, Exchange, Target
from tests.support.servers import Server

CHAT = "/v1/chat/completions"
TEXT = (
    "the sea was calm and a bridge of stone stood over the river where people walked to market with bread apples fish "
    "and cloth while children played near an old mill under the wide sky"
)


@dataclass(frozen=True)
class Finding:
    """What was asked for, what was measured, and whether the one holds for the other; None: nothing was asked."""

    what: str
    asked: str
    measured: str
    held: bool | None = None


@dataclass
class Crowd:
    """Clients with one API key. A chat has words of its own, so that no other has left its keys and values."""

    server: Server
    key: str | None = None
    random: random.Random = field(default_factory=lambda: random.Random(0))
    _client: Client = field(init=False)

    def __post_init__(self) -> None:
        self._client = Client(Target.of(self.server.url, CHAT, self.key))

    async def ask(self, num_words: int, max_tokens: int, **fields: object) -> Exchange:
        """A streamed chat to its end; what goes wrong is the exchange's `error`."""
        exchange = Exchange(time.perf_counter(), max_tokens)
        await self._client.send(self.body(num_words, max_tokens, **fields), exchange)
        return exchange

    def body(self, num_words: int, max_tokens: int, **fields: object) -> bytes:
        text = " ".join(self.random.choices(TEXT.split(), k=num_words))
        body = {"messages": [{"role": "user", "content": text}], "max_tokens": max_tokens, "temperature": 0}
        usage = {"stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True}
        return msgspec.json.encode(body | usage | fields)

    async def chats(self, seconds: float, num_words: int, max_tokens: int, pause: float = 0.2) -> list[Exchange]:
        """One after the other for so long, at least two."""
        made: list[Exchange] = []
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or len(made) < 2:
            made.append(checked(await self.ask(num_words, max_tokens)))
            await asyncio.sleep(self.random.random() * pause)
        return made

    def close(self) -> None:
        self._client.close()


def checked(exchange: Exchange) -> Exchange:
    assert exchange.error is None, exchange.error
    return exchange


@contextlib.asynccontextmanager
async def meanwhile(count: int, ask: Callable[[], Awaitable[object]]) -> AsyncIterator[None]:
    """So many clients ask again and again; at the end they hang up. What a client of ours raises is raised here."""

    async def loop() -> None:
        while True:
            await ask()

    tasks = [asyncio.create_task(loop()) for _ in range(count)]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
    for error in ended:
        if isinstance(error, Exception):
            raise error


def first_token(exchange: Exchange) -> float:
    assert exchange.first is not None
    return exchange.first - exchange.asked


def whole(exchange: Exchange) -> float:
    assert exchange.ended is not None
    return exchange.ended - exchange.asked


def per_token(exchange: Exchange) -> float:
    assert exchange.first is not None
    assert exchange.last is not None
    return (exchange.last - exchange.first) / max(1, exchange.max_tokens - 1)


def quantile(values: Sequence[float], share: float) -> float:
    """Of few values the largest, which is what a high quantile of them can be."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def times(ratio: float, most: float, what: str, detail: str) -> Finding:
    return Finding(what, f"at most {most:g} ×", f"{ratio:.2f} × ({detail})", ratio <= most)


def flags_of(options: argparse.Namespace) -> tuple[str, ...]:
    """Those of every server."""
    return ("--model", options.model, "--log-level", "warning", "--kv-cache-gib", "0.5")
