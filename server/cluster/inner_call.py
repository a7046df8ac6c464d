"""One request that the ingress has sent, inside of a replica: the app's other end."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from typing import Any

from starlette.types import ASGIApp, Message

from softbatch.server.cluster.wire import Asked, ReplyHead, ReplyPart, Said, unpack_entry
from softbatch.server.http.errors import error_response, unavailable
from softbatch.server.journal import Entry, Journal, SequenceOpened, keep_journal

# What waits to be taken by Ray; an app that is further ahead waits. Ray takes at once what it can get, and keeps it for
# an ingress whose client reads slowly: as much as the reply is long.
MOST_BYTES = 1 << 20
# What is computed in so short a time, another replica may compute again.
ENTRY_SECONDS = 0.2
# That an app may take to end once its client has gone.
FAREWELL_SECONDS = 5.0


class InnerCall:
    """Runs the app on one request. What the app and the journal say comes out in the order in which they said it.

    `model` is the fingerprint of the one served here: what another model has begun is refused.
    """

    def __init__(self, app: ASGIApp, asked: Asked, body: bytes, model: str = "") -> None:
        self._app = app
        self._model = model
        self._asked = asked
        self._body: bytes | None = body
        self._said: list[Said] = []
        self._num_bytes = 0
        self._changed = asyncio.Event()
        self._fetched = asyncio.Event()
        self._gone = asyncio.Event()
        self._alarm: asyncio.TimerHandle | None = None

    async def run(self) -> AsyncGenerator[list[Said], None]:
        """Everything new since the last look. Leaving early tells the app that its client has gone."""
        running = asyncio.create_task(self._run())
        running.add_done_callback(lambda _: self._changed.set())
        try:
            while self._said or not running.done():
                await self._changed.wait()
                self._changed.clear()
                said, self._said, self._num_bytes = self._said, [], 0
                self._stop_alarm()
                self._fetched.set()
                if said:
                    yield said
            running.result()
        finally:
            self._gone.set()
            self._fetched.set()
            self._stop_alarm()
            if not running.done():
                await asyncio.wait({running}, timeout=FAREWELL_SECONDS)
                running.cancel()
            with contextlib.suppress(Exception, asyncio.CancelledError):
                await running

    async def _run(self) -> None:
        app = self._app
        if self._asked.entries is not None:
            entries = [unpack_entry(entry) for entry in self._asked.entries]
            if any(isinstance(entry, SequenceOpened) and entry.model != self._model for entry in entries):
                message = "the replica died, and this one serves another model"
                app = error_response(unavailable(message, code="replica_lost"), self._asked.path)
            keep_journal(Journal(self._write, entries, self._model))
        await app(_scope(self._asked), self._receive, self._send)

    def _write(self, entry: Entry) -> None:
        """An entry goes with what is made of it. Of a reply that comes as a whole it may wait for others."""
        self._said.append(entry)
        if self._alarm is None and not self._gone.is_set():
            self._alarm = asyncio.get_running_loop().call_later(ENTRY_SECONDS, self._changed.set)

    def _stop_alarm(self) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None

    async def _receive(self) -> Message:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._said.append(ReplyHead(message["status"], list(message.get("headers", ()))))
        elif message["type"] == "http.response.body":
            data = bytes(message.get("body", b""))
            self._said.append(ReplyPart(data, message.get("more_body", False)))
            self._num_bytes += len(data)
        self._changed.set()
        while self._num_bytes > MOST_BYTES and not self._gone.is_set():
            self._fetched.clear()
            await self._fetched.wait()


def _scope(asked: Asked) -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": asked.http_version,
        "method": asked.method,
        "scheme": asked.scheme,
        "path": asked.path,
        "raw_path": asked.raw_path,
        "root_path": "",
        "query_string": asked.query_string,
        "headers": asked.headers,
        "client": asked.client,
        "server": asked.server,
    }
