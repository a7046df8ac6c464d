"""A streaming HTTP/1.1 client that costs a few microseconds per token: it counts events and parses none of them."""

from __future__ import annotations

import asyncio
import re
import ssl
import time
import urllib.parse
from collections import deque
from dataclasses import dataclass, field
from typing import cast

import httptools

_CONTENT = re.compile(rb'"(?:text|content)":\s*"[^"]')
_COMPLETION_TOKENS = re.compile(rb'"completion_tokens":\s*(\d+)')
_MAX_ERROR_BYTES = 4096


@dataclass
class Exchange:
    """One request and what came back. Times are `time.perf_counter()` seconds; `asked` is when the request was due,
    so that a client that is late counts against the server rather than hiding a wait."""

    asked: float
    max_tokens: int
    first: float | None = None
    last: float | None = None
    ended: float | None = None
    events: int = 0
    tokens: int | None = None
    error: str | None = None


@dataclass
class Counter:
    """Events of all exchanges together, so that a moment's count can be read without visiting each."""

    events: int = 0


class ClosedByServer(Exception):
    """A kept-alive connection was gone before the request reached anybody."""


@dataclass(frozen=True)
class Target:
    """Where requests go: the address of an OpenAI-compatible server."""

    host: str
    port: int
    path: str
    tls: bool
    headers: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, url: str, path: str, api_key: str | None = None) -> Target:
        """Raises ValueError when `url` is no HTTP address."""
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url}: give an address such as http://127.0.0.1:8000")
        tls = parts.scheme == "https"
        headers = (("Authorization", f"Bearer {api_key}"),) if api_key else ()
        return cls(parts.hostname, parts.port or (443 if tls else 80), parts.path.rstrip("/") + path, tls, headers)

    def head(self, length: int) -> bytes:
        lines = [f"POST {self.path} HTTP/1.1", f"Host: {self.host}:{self.port}", "Content-Type: application/json"]
        lines += [f"Content-Length: {length}", *(f"{name}: {value}" for name, value in self.headers)]
        return ("\r\n".join(lines) + "\r\n\r\n").encode()


class _Connection(asyncio.Protocol):
    """One connection, used by one exchange at a time."""

    def __init__(self, counter: Counter) -> None:
        self.reusable = False
        self._counter = counter
        self._transport: asyncio.Transport | None = None
        self._exchange: Exchange | None = None
        self._done: asyncio.Future[None] | None = None
        self._parser: httptools.HttpResponseParser
        self._now = 0.0
        self._begun = False

    async def send(self, target: Target, body: bytes, exchange: Exchange) -> None:
        """Returns when the reply has ended. Raises ClosedByServer or OSError."""
        assert self._transport is not None
        self._exchange, self._begun, self.reusable = exchange, False, False
        self._parser = httptools.HttpResponseParser(self)
        self._recent: deque[bytes] = deque(maxlen=4)
        self._done = asyncio.get_running_loop().create_future()
        self._transport.write(target.head(len(body)) + body)
        await self._done

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    @property
    def open(self) -> bool:
        return self.reusable and self._transport is not None and not self._transport.is_closing()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's are no subclass of it
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if self._exchange is None:
            return
        self._now, self._begun = time.perf_counter(), True
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._end(f"no HTTP: {error}")
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.reusable = False
        if self._done is None or self._done.done():
            return
        if not self._begun:
            self._done.set_exception(ClosedByServer())
            return
        self._now = time.perf_counter()
        self._end("the connection was closed in the middle of a reply")

    def on_body(self, chunk: bytes) -> None:
        exchange = self._exchange
        assert exchange is not None
        # A marker cut in two by a packet's end is missed; exact counts come from the reply's `usage`.
        count = chunk.count(b"data: ")
        exchange.events += count
        self._counter.events += count
        exchange.last = self._now
        if exchange.first is None and _CONTENT.search(chunk):
            exchange.first = self._now
        self._recent.append(chunk)

    def on_message_complete(self) -> None:
        status = self._parser.get_status_code()
        self.reusable = self._parser.should_keep_alive()
        text = b"".join(self._recent)
        assert self._exchange is not None
        if status != 200:
            self._end(f"status {status}: {text[:_MAX_ERROR_BYTES].decode(errors='replace')}")
            return
        counts = _COMPLETION_TOKENS.findall(text)
        self._exchange.tokens = int(counts[-1]) if counts else None
        self._end(None if b"[DONE]" in text else f"the stream broke off: {text[-200:].decode(errors='replace')}")

    def _end(self, error: str | None) -> None:
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            exchange.error = error
            exchange.ended = self._now
        if self._done is not None and not self._done.done():
            self._done.set_result(None)


@dataclass
class Client:
    """Keeps connections open between exchanges, and opens new ones where a server closes them."""

    target: Target
    counter: Counter = field(default_factory=Counter)
    _idle: list[_Connection] = field(default_factory=list)
    _all: set[_Connection] = field(default_factory=set)

    async def send(self, body: bytes, exchange: Exchange) -> None:
        """Fills in `exchange`; what goes wrong is its `error`."""
        while True:
            kept = self._kept()
            try:
                connection = kept or await self._connect()
                await connection.send(self.target, body, exchange)
            except ClosedByServer:
                if kept is not None:
                    continue  # the server had closed it meanwhile: nothing was lost
                exchange.error = "the connection was closed without a reply"
            except OSError as error:
                exchange.error = f"no connection: {error.strerror or error}"
            except asyncio.CancelledError:
                connection.close()
                raise
            else:
                if connection.open:
                    self._idle.append(connection)
                else:
                    self._all.discard(connection)
                return
            exchange.ended = time.perf_counter()
            return

    def close(self) -> None:
        for connection in self._all:
            connection.close()
        self._all.clear()

    def _kept(self) -> _Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.open:
                return connection
            self._all.discard(connection)
        return None

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        context = ssl.create_default_context() if self.target.tls else None
        _, connection = await loop.create_connection(
            lambda: _Connection(self.counter), self.target.host, self.target.port, ssl=context
        )
        self._all.add(connection)
        return connection
