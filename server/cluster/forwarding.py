"""One HTTP request on its way to a replica, and to another one should that die."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from starlette.types import Message, Send

from softbatch.server.cluster.request_kinds import place_of
from softbatch.server.cluster.wire import Asked, Headers, ReplyHead, ReplyPart, Said, pack_entry
from softbatch.server.http.errors import ANTHROPIC_PATHS, ApiError, error_json, error_response, unavailable

logger = logging.getLogger(__name__)

# Whoever outlives so many replicas may well be what kills them.
MOST_DEATHS = 3
# What had been taken is not refused because those who are left are full: it waits for so long, and asks again.
PATIENCE_SECONDS = 120.0
SECONDS_TO_ASK_AGAIN = 0.5
NOT_NOW = frozenset({429, 503})
# Of files, batches and compressions, one replica has them: so often at most the others are asked who refuse.
MOST_ELSEWHERE = 25
SECONDS_TO_ASK_OTHERS = 0.2
_ELSEWHERE = (b'"batches_elsewhere"', b'"compressions_elsewhere"')
# A refusal without it stays one.
_ASK_AGAIN = b"retry-after"
# Serve's proxy sends the request's id itself.
_DROPPED = frozenset({b"x-request-id", b"transfer-encoding", b"connection"})
_KEPT_ALIVE = (b": ", b"event: ping")
# Whose streams are of named events.
_NAMED_EVENTS = ANTHROPIC_PATHS | {"/v1/responses"}

# From the packed entries of the journal so far to what a replica says. Raises what `lost_by` knows.
Ask = Callable[[list[bytes] | None], AsyncGenerator[list[Said], None]]


class _NoRoom(Exception):
    """Another replica has no room for what had been taken."""


class _Elsewhere(Exception):
    """Another replica has what this is about; nothing was done."""


class _GoesOnOtherwise(Exception):
    """What has begun cannot be gone on with: the message says why."""


class Forwarding:
    """`lost_by` are the exceptions that tell of a replica's death.

    What the client has been sent already is skipped when another replica says it again: bytes of a plain reply; of a
    stream the very same events, which come again as the journal has all that they were made of.
    """

    def __init__(self, asked: Asked, send: Send, lost_by: tuple[type[BaseException], ...], *, repeatable: bool) -> None:
        self._asked = asked
        self._send = send
        self._lost_by = lost_by
        self._is_repeatable = repeatable
        self._entries = None if asked.entries is None else list(asked.entries)
        self._head: ReplyHead | None = None
        self._is_stream = False
        self._num_sent = 0
        self._sent: Counter[int] = Counter()  # events, by their hashes
        self._skip_bytes = 0
        self._skip: Counter[int] = Counter()
        self._held: ReplyHead | None = None  # may yet be told to go elsewhere
        self._num_elsewhere = 0
        self.deaths = 0

    @property
    def status(self) -> int | None:
        """Of the reply that the client has been sent."""
        return self._head.status if self._head is not None else None

    async def run(self, ask: Ask) -> None:
        loop = asyncio.get_running_loop()
        until = None
        while True:
            self._held = None
            self._skip_bytes, self._skip = self._num_sent, Counter(self._sent)
            is_whole = False
            try:
                async with aclosing(ask(self._entries)) as saying:
                    async for said in saying:
                        for one in said:
                            is_whole |= await self._take(one, may_refuse=until is None or loop.time() > until)
                if not is_whole:
                    raise RuntimeError("a replica's reply broke off")
                return
            except _Elsewhere:
                await asyncio.sleep(SECONDS_TO_ASK_OTHERS)
            except _NoRoom:
                await asyncio.sleep(SECONDS_TO_ASK_AGAIN)
            except _GoesOnOtherwise as error:
                await self._fail(unavailable(str(error), code="replica_lost"))
                return
            except self._lost_by as error:
                if is_whole:
                    return
                self.deaths += 1
                until = until or loop.time() + PATIENCE_SECONDS
                path = self._asked.path
                if not self._is_repeatable or self.deaths == MOST_DEATHS:
                    logger.error("%s %.200r is lost with its replica: %s", self._asked.method, path, _line(error))
                    await self._fail(self._loss())
                    return
                logger.warning("%s %.200r goes to another replica: %s", self._asked.method, path, _line(error))

    def _loss(self) -> ApiError:
        if self._is_repeatable:
            return unavailable(f"{MOST_DEATHS} replicas have died on this request", code="replicas_lost")
        message = "the replica died; look whether this was done before you ask for it again"
        return unavailable(message, code="replica_lost")

    async def _take(self, said: Said, *, may_refuse: bool) -> bool:
        """Whether that was the last of the reply."""
        if isinstance(said, ReplyHead):
            if said.status == 503 and self._head is None and place_of(self._asked.path):
                self._held = said
            else:
                await self._begin(said, may_refuse=may_refuse)
            return False
        if not isinstance(said, ReplyPart):
            if self._entries is not None:
                self._entries.append(pack_entry(said))
            return False
        if self._held is not None:
            if self._num_elsewhere < MOST_ELSEWHERE and any(code in said.data for code in _ELSEWHERE):
                self._num_elsewhere += 1
                raise _Elsewhere
            held, self._held = self._held, None
            await self._begin(held, may_refuse=may_refuse)
        data = self._new_part(said.data)
        if data or not said.more:
            await self._send(_body(data, more=said.more))
        return not said.more

    async def _begin(self, head: ReplyHead, *, may_refuse: bool) -> None:
        if head.status in NOT_NOW and not may_refuse and any(name.lower() == _ASK_AGAIN for name, _ in head.headers):
            raise _NoRoom
        if self._head is None:
            self._head = head
            self._is_stream = any(
                name == b"content-type" and value.startswith(b"text/event-stream") for name, value in head.headers
            )
            await self._send(_start(head.status, head.headers))
        elif self._head.status != head.status:
            message = f"the replica died, and another one answers {head.status} where it said {self._head.status}"
            raise _GoesOnOtherwise(message)
        elif not self._is_stream and _content(head) != _content(self._head):
            raise _GoesOnOtherwise("the replica died, and another one has another content")

    def _new_part(self, data: bytes) -> bytes:
        """Without what the client has."""
        if not self._is_stream:
            skipped = min(len(data), self._skip_bytes)
            self._skip_bytes -= skipped
            self._num_sent += len(data) - skipped
            return data[skipped:]
        if not data or data.startswith(_KEPT_ALIVE):
            return data
        key = hash(data)
        if self._skip[key]:
            self._skip[key] -= 1
            return b""
        self._sent[key] += 1
        return data

    async def _fail(self, error: ApiError) -> None:
        """As the answer, or as the last event of a stream that has begun."""
        path = self._asked.path
        if self._head is None:
            await error_response(error, path)({"type": "http"}, _receive_nothing, self._send)
        elif self._is_stream:
            name = b"event: error\n" if path in _NAMED_EVENTS else b""
            await self._send(_body(b"%bdata: %b\n\n" % (name, error_json(error, path).encode()), more=False))
        else:
            raise RuntimeError(error.message)  # the connection breaks: nothing else says that a reply is not whole


def _content(head: ReplyHead) -> dict[bytes, bytes]:
    """What tells whether the bytes behind it are those of another reply."""
    return {name.lower(): value for name, value in head.headers if name.lower() in (b"content-length", b"etag")}


def _start(status: int, headers: Headers) -> Message:
    kept = [(name, value) for name, value in headers if name.lower() not in _DROPPED]
    return {"type": "http.response.start", "status": status, "headers": kept}


def _body(data: bytes, *, more: bool) -> Message:
    return {"type": "http.response.body", "body": data, "more_body": more}


async def _receive_nothing() -> Message:
    await asyncio.Event().wait()
    raise AssertionError


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]
