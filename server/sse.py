"""Server-sent events: the wire format of every stream, its end, and what happens when it breaks off."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing

from sse_starlette.event import ServerSentEvent
from sse_starlette.sse import EventSourceResponse, SendTimeoutError
from starlette.types import Receive, Scope, Send

from server.errors import ApiError, error_json, internal_error
from server.generation import Generation

logger = logging.getLogger(__name__)

DONE = "[DONE]"
PING_SECONDS = 15
# A client that takes nothing for so long has its stream ended.
STALL_SECONDS = 60.0
# How long running streams may go on once the server was told to stop.
DRAIN_SECONDS = 300.0


class EventStream(EventSourceResponse):
    """Sends JSON texts as events, `data: {...}`, and cancels the generations however the stream ends.

    An error in the middle becomes a last event in the shape of every other error.
    """

    def __init__(self, events: AsyncGenerator[str, None], generations: Sequence[Generation], route: str) -> None:
        super().__init__(
            _encoded(events, route),
            headers={"Cache-Control": "no-cache"},
            ping=PING_SECONDS,
            ping_message_factory=lambda: ServerSentEvent(comment="ping", sep="\n"),
            send_timeout=STALL_SECONDS,
            shutdown_grace_period=DRAIN_SECONDS,
        )
        self._generations = tuple(generations)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        except SendTimeoutError:
            logger.info("ended a stream of %s: nothing was read for %g s", scope["path"], STALL_SECONDS)
        finally:
            # A client that is gone before the first event leaves an iterator behind that never ran.
            for generation in self._generations:
                generation.cancel()


async def _encoded(events: AsyncGenerator[str, None], route: str) -> AsyncIterator[bytes]:
    try:
        async with aclosing(events) as source:
            async for event in source:
                yield _event(event)
    except ApiError as error:
        yield _event(error_json(error))
    except Exception as error:
        yield _event(error_json(internal_error(error, route)))


def _event(data: str) -> bytes:
    # JSON has no line breaks of its own, so an event is always one line.
    return f"data: {data}\n\n".encode()
