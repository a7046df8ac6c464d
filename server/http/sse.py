"""Server-sent events: the wire format of every stream, its end, and what happens when it breaks off."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from softbatch.server.http.errors import ApiError, as_api_error, error_json, internal_error, note_error
from softbatch.server.observability.request_record import current
from softbatch.server.request_failures import Failure
from softbatch.server.requests.generation import Generation

logger = logging.getLogger(__name__)

DONE = "[DONE]"
PING = b": ping\n\n"
PING_SECONDS = 15.0
# A client that takes nothing for so long has its stream ended.
STALL_SECONDS = 60.0


class EventStream(Response):
    """Sends JSON texts as events, `data: {...}`, and cancels the generations however the stream ends.

    An error in the middle becomes a last event in the shape of every other error. A token costs one pass through
    `_send` and no timer of its own: whether the client still reads is looked at from beside.
    """

    media_type = "text/event-stream"
    ping = PING

    def __init__(
        self, events: AsyncGenerator[str | bytes, None], generations: Sequence[Generation], route: str
    ) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._events = events
        self._generations = tuple(generations)
        self._route = route
        self._sending_since: float | None = None
        current().is_streamed = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.create_task(self._send(send))
        others = (asyncio.create_task(_disconnected(receive)), asyncio.create_task(self._beat(send, scope["path"])))
        try:
            await asyncio.wait((sending, *others), return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        finally:
            for task in (sending, *others):
                task.cancel()
            await asyncio.gather(sending, *others, return_exceptions=True)
            # A client that is gone before the first event leaves an iterator behind that never ran.
            for generation in self._generations:
                generation.cancel()

    def frame(self, data: bytes) -> bytes:
        """JSON has no line breaks of its own, so an event is always one line."""
        return b"data: %b\n\n" % data

    def error_event(self, error: ApiError) -> str:
        """The last event of a stream that fails."""
        return error_json(error, self._route)

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async with aclosing(self._events) as source:
                async for event in source:
                    await self._write(send, event)
        except Failure as error:
            await self._fail(send, as_api_error(error))
        except Exception as error:
            await self._fail(send, internal_error(error, self._route, current().id))
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _fail(self, send: Send, error: ApiError) -> None:
        note_error(error)
        await self._write(send, self.error_event(error))

    async def _write(self, send: Send, event: str | bytes) -> None:
        data = event if isinstance(event, bytes) else event.encode()
        self._sending_since = time.monotonic()
        await send({"type": "http.response.body", "body": self.frame(data), "more_body": True})
        self._sending_since = None

    async def _beat(self, send: Send, path: str) -> None:
        """Comments keep proxies from closing a quiet stream. Returns when the client has stalled."""
        pinged = time.monotonic()
        try:
            while True:
                await asyncio.sleep(min(PING_SECONDS, STALL_SECONDS) / 4)
                now = time.monotonic()
                if self._sending_since is not None and now - self._sending_since > STALL_SECONDS:
                    break
                if now - pinged >= PING_SECONDS:
                    pinged = now
                    async with asyncio.timeout(STALL_SECONDS):
                        await send({"type": "http.response.body", "body": self.ping, "more_body": True})
        except TimeoutError:
            pass
        logger.info("ended a stream of %s: nothing was read for %g s", path, STALL_SECONDS)


class NamedEventStream(EventStream):
    """A stream each of whose events says in its first field, `type`, what it is: the event's name says it too."""

    def frame(self, data: bytes) -> bytes:
        kind = data.split(b'"', 4)[3]
        return b"event: %b\ndata: %b\n\n" % (kind, data)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
