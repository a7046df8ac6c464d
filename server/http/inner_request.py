"""A request that the server asks itself: the same routes and the same answers, without a connection."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import msgspec
from fastapi import APIRouter, FastAPI
from starlette.datastructures import Headers
from starlette.types import Message

from softbatch.server.batches.line_answer import LineReply, LineRequest
from softbatch.server.http.errors import ApiError, error_json, install_handlers, internal_error
from softbatch.server.observability.request_record import RequestRecord, begin

# Answers of a server that is full, shutting down, or whose engine is away.
_NOT_NOW = frozenset({429, 503})
_RETRY_SECONDS = 5.0


class InnerApp:
    """The given routes around `services`, for requests that go behind everything else. What a client's request passes
    before its route, such as keys and limits of bodies, was looked at when the batch came."""

    def __init__(self, services: object, routers: tuple[APIRouter, ...]) -> None:
        self._app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
        self._app.state.services = services
        for router in routers:
            self._app.include_router(router)
        install_handlers(self._app)

    async def ask(self, line: LineRequest) -> LineReply:
        """Cancelling it takes the request out of the engine."""
        # In a task of its own, whose context is the request's.
        return await asyncio.create_task(self._ask(line))

    async def _ask(self, line: LineRequest) -> LineReply:
        begin(RequestRecord(line.id, owner=line.owner, is_admin=False, is_background=True))
        if _wants_stream(line.body):
            error = ApiError(400, "stream: a line of a batch is answered as a whole; leave it out", param="stream")
            return LineReply(error.status, error_json(error, line.endpoint).encode())
        reply = _Reply(line.body)
        try:
            await self._app(_scope(line), reply.receive, reply.send)
        except Exception as error:
            # Starlette raises it once more behind the answer that it became, if it became one.
            if reply.status == 0:
                failure = internal_error(error, f"a line of a batch for {line.endpoint}", line.id)
                return LineReply(failure.status, error_json(failure, line.endpoint).encode())
        if reply.status in _NOT_NOW:
            return LineReply(reply.status, reply.body, _seconds(reply.headers.get("retry-after")))
        return LineReply(reply.status, reply.body)


class _Reply:
    """The other end of a request: it has one body, and never goes away."""

    def __init__(self, body: bytes) -> None:
        self._request: bytes | None = body
        self._parts: list[bytes] = []
        self.status = 0
        self.headers = Headers()

    @property
    def body(self) -> bytes:
        return b"".join(self._parts)

    async def receive(self) -> Message:
        if self._request is None:
            await asyncio.Event().wait()  # until it is cancelled
        body, self._request = self._request, None
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = Headers(raw=message["headers"])
        elif message["type"] == "http.response.body":
            self._parts.append(message.get("body", b""))


class _Streamed(msgspec.Struct):
    stream: bool | None = None


def _wants_stream(body: bytes) -> bool:
    """A body that cannot be read is the route's to refuse."""
    try:
        return bool(msgspec.json.decode(body, type=_Streamed).stream)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return False


def _scope(line: LineRequest) -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": line.endpoint,
        "raw_path": line.endpoint.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json"), (b"content-length", str(len(line.body)).encode())],
        "client": None,
        "server": None,
    }


def _seconds(retry_after: str | None) -> float:
    with contextlib.suppress(ValueError):
        return float(retry_after or _RETRY_SECONDS)
    return _RETRY_SECONDS
