"""What a connection may take before anybody knows who is at its other end: places, bytes of a head, and time."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass
from typing import ClassVar, Literal

from starlette.datastructures import Headers
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from softbatch.server.http.errors import ApiError, error_json
from softbatch.server.http.request_log import HEADER, SCOPE_KEY, request_id
from softbatch.server.http.unchunked import answer_without_chunks
from softbatch.server.observability.metrics import Metrics
from softbatch.server.settings import Settings

# A body may take --body-timeout, and longer if it comes at this rate or faster: an upload on a slow line does.
MIN_BODY_BYTES_PER_SECOND = 16 << 10
SWEEP_SECONDS = 1.0
Reason = Literal["connections", "address", "head_size", "head_timeout", "body_timeout"]


class _Refused(Exception):
    """Raised inside of a parser's callback, which ends the parsing."""


@dataclass(frozen=True)
class ConnectionBounds:
    """As the flags of `serve` of the same names say; None is no limit."""

    max_connections: int
    max_connections_per_address: int | None
    max_header_bytes: int
    max_headers: int
    head_timeout: float
    body_timeout: float

    @classmethod
    def of(cls, settings: Settings) -> ConnectionBounds:
        return cls(**{name: getattr(settings, name) for name in cls.__dataclass_fields__})


class Connections:
    """Owns the list of open connections, and what may be asked of each."""

    def __init__(self, bounds: ConnectionBounds, metrics: Metrics) -> None:
        self.bounds = bounds
        self._metrics = metrics
        self._open: set[BoundedProtocol] = set()
        self._of_address: Counter[str] = Counter()
        metrics.connections.set_function(lambda: len(self._open))

    def protocol(self) -> type[HttpToolsProtocol]:
        """The class that uvicorn makes one of for each connection."""
        return type("BoundProtocol", (BoundedProtocol,), {"connections_of_server": self})

    def add(self, connection: BoundedProtocol, address: str) -> Reason | None:
        """Why the connection may not stay; None if it may."""
        most = self.bounds.max_connections_per_address
        if len(self._open) >= self.bounds.max_connections:
            return "connections"
        if most is not None and self._of_address[address] >= most:
            return "address"
        self._open.add(connection)
        self._of_address[address] += 1
        return None

    def remove(self, connection: BoundedProtocol, address: str) -> None:
        if connection in self._open:
            self._open.remove(connection)
            self._of_address[address] -= 1
            if not self._of_address[address]:
                del self._of_address[address]

    def count_refusal(self, reason: Reason) -> None:
        self._metrics.connections_refused.labels(reason).inc()

    async def keep_sweeping(self) -> None:
        """Until cancelled, so that a server that drains does not wait for a request that never comes."""
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            await self.sweep()

    async def sweep(self) -> None:
        """End the connections whose request takes too long to come. Called every second: a timer for each request would
        cost more than this."""
        for connection in list(self._open):
            connection.check_time()


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's protocol, which by itself takes heads of any size and waits for requests without an end.

    `_part` is what the client is sending: the head of a request, as it must on a new connection, its body, or nothing.
    """

    connections_of_server: ClassVar[Connections]
    _part: Literal["head", "body", "none"] = "head"
    _part_bytes = 0
    _since = 0.0
    _address = ""
    _refusal: tuple[Reason, ApiError] | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        peer = transport.get_extra_info("peername")
        self._address = str(peer[0]) if isinstance(peer, tuple) else ""
        self._since = self.loop.time()
        reason = self.connections_of_server.add(self, self._address)
        if reason is not None:
            self.transport = transport
            message = "too many connections" + (" from this address" if reason == "address" else "")
            self._refuse(reason, ApiError(503, f"{message}; try again later", code="too_many_connections"))
            return
        super().connection_made(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self.connections_of_server.remove(self, self._address)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refusal is not None:
            return
        super().data_received(data)
        if self._refusal is not None or self.transport.is_closing():
            return
        if self._part == "head":
            self._part_bytes += len(data)
            bounds = self.connections_of_server.bounds
            headers = len(self.headers) if self.headers else 0
            if self._part_bytes > bounds.max_header_bytes or headers > bounds.max_headers:
                self._refuse("head_size", _too_large(bounds))
        elif self._part == "none" and self.timeout_keep_alive_task is None and not self._is_answering():
            # Empty lines between requests, which uvicorn takes for the next request.
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def on_message_begin(self) -> None:
        self._part, self._part_bytes, self._since = "head", 0, self.loop.time()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        bounds = self.connections_of_server.bounds
        size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if size > bounds.max_header_bytes or len(self.headers) > bounds.max_headers:
            self._refuse("head_size", _too_large(bounds))
            raise _Refused
        self._part, self._part_bytes, self._since = "body", 0, self.loop.time()
        super().on_headers_complete()
        if self.parser.get_http_version() == "1.0" and self.cycle is not None:
            answer_without_chunks(self.cycle)

    def on_body(self, body: bytes) -> None:
        self._part_bytes += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._part = "none"
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """uvicorn calls this for whatever ends the parsing."""
        if self._refusal is None:
            self._write(ApiError(400, "this is not a valid HTTP request", code="invalid_http"))

    def check_time(self) -> None:
        """End the connection if the part that the client is sending takes longer than it may."""
        bounds = self.connections_of_server.bounds
        now = self.loop.time()
        waited = now - self._since
        if self._part == "head" and self._is_answering():
            self._since = now  # the next request is read when this one has been answered
        elif self._part == "head" and waited > bounds.head_timeout:
            self._refuse("head_timeout", _too_slow("head", bounds.head_timeout))
        elif self._part == "body" and not self.flow.read_paused:
            allowed = bounds.body_timeout + self._part_bytes / MIN_BODY_BYTES_PER_SECOND
            if waited > allowed:
                self._refuse("body_timeout", _too_slow("body", allowed))

    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _refuse(self, reason: Reason, error: ApiError) -> None:
        self._refusal = (reason, error)
        self.connections_of_server.count_refusal(reason)
        self._write(error)

    def _write(self, error: ApiError) -> None:
        """Answer and close. If an answer has begun already, or the client has sent nothing at all, just close."""
        has_begun = self.cycle.response_started if self._part == "body" else self._is_answering()
        is_silent = self._part == "head" and not self._part_bytes and error.status == 408
        if not (has_begun or is_silent or self.transport.is_closing()):
            path = self.scope["path"] if self._part == "body" else ""  # before the body begins it is not known
            body = error_json(error, path).encode()
            lines = ("content-type: application/json", f"content-length: {len(body)}", "connection: close")
            head = "\r\n".join((*lines, f"{HEADER.lower()}: {self._request_id()}", "", ""))
            self.transport.write(STATUS_LINE[error.status] + head.encode() + body)
        self.transport.close()

    def _request_id(self) -> str:
        """As the log has it, once the app has begun with the request; before, as far as its head has come."""
        known = self.scope.get(SCOPE_KEY) if self._part == "body" else None
        return str(known or request_id(Headers(raw=self.headers or [])))


def _too_large(bounds: ConnectionBounds) -> ApiError:
    message = f"the head of the request is larger than {bounds.max_header_bytes} bytes or {bounds.max_headers} headers"
    return ApiError(431, message, code="headers_too_large")


def _too_slow(part: str, seconds: float) -> ApiError:
    return ApiError(408, f"the {part} of the request did not come within {seconds:.0f} seconds", code="request_timeout")
