"""Choices merged, streams framed and broken off, replies given up: with scripted generations, no engine."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from typing import Any

import pytest
from fastapi import FastAPI, Request
from hypothesis import given
from hypothesis import strategies as st

from softbatch.server.http import sse
from softbatch.server.http.disconnect import until_disconnect
from softbatch.server.http.errors import ApiError
from softbatch.server.http.sse import DONE, EventStream
from softbatch.server.requests.choices import gather, merge
from softbatch.server.requests.generation import Delta
from softbatch.server.routes import ROUTERS
from softbatch.server.routes.common import ChunkTemplate
from softbatch.server.schemas.completions import Completion, CompletionChoice

Step = str | Exception | asyncio.Event


class Scripted:
    """Yields its texts as deltas, raises its exceptions and waits for its events, in order."""

    def __init__(self, *steps: Step) -> None:
        self.steps = steps
        self.cancelled = False
        self.closed = False

    async def __aiter__(self) -> AsyncIterator[Delta]:
        try:
            for number, step in enumerate(self.steps, 1):
                if isinstance(step, asyncio.Event):
                    await step.wait()
                elif isinstance(step, Exception):
                    raise step
                else:
                    reason = "eos" if number == len(self.steps) else None
                    yield Delta(step, (), reason)  # type: ignore[arg-type]
                    await asyncio.sleep(0)
        finally:
            self.closed = True

    def cancel(self) -> None:
        self.cancelled = True


async def collect(*generations: Any) -> list[tuple[int, str]]:
    return [(index, delta.text) async for index, delta in merge(generations)]


def test_merge_keeps_each_choice_in_order() -> None:
    merged = asyncio.run(collect(Scripted("a", "b", "c"), Scripted("x"), Scripted("1", "2")))
    assert sorted(merged, key=lambda pair: pair[0]) == [(0, "a"), (0, "b"), (0, "c"), (1, "x"), (2, "1"), (2, "2")]
    assert merged[:3] == [(0, "a"), (1, "x"), (2, "1")]


def test_merge_does_not_let_a_slow_choice_hold_back_a_fast_one() -> None:
    async def run() -> list[tuple[int, str]]:
        gate = asyncio.Event()
        seen = []
        async for index, delta in merge([Scripted(gate, "late"), Scripted("a", "b")]):  # type: ignore[list-item]
            seen.append((index, delta.text))
            if delta.text == "b":
                gate.set()
        return seen

    assert asyncio.run(run()) == [(1, "a"), (1, "b"), (0, "late")]


def test_merge_ends_all_with_the_first_error() -> None:
    waiting, failing = Scripted(asyncio.Event()), Scripted("a", ApiError(503, "gone"))
    with pytest.raises(ApiError, match="gone"):
        asyncio.run(collect(waiting, failing))
    assert waiting.cancelled
    assert waiting.closed


def test_merge_cancels_all_when_the_reader_leaves() -> None:
    first, second = Scripted("a", asyncio.Event()), Scripted(asyncio.Event())

    async def run() -> list[bool]:
        merged: AsyncGenerator[Any, None] = merge([first, second])  # type: ignore[list-item]
        await anext(merged)
        await merged.aclose()
        return [first.cancelled, second.cancelled, first.closed, second.closed]

    assert asyncio.run(run()) == [True] * 4


def test_gather_puts_every_choice_together() -> None:
    choices = asyncio.run(gather([Scripted("a", "b"), Scripted("x")]))  # type: ignore[list-item]
    assert [(choice.text, choice.finish_reason) for choice in choices] == [("ab", "eos"), ("x", "eos")]


class Client:
    """The other end of an ASGI connection."""

    def __init__(self) -> None:
        self.gone = asyncio.Event()
        self.sent: list[dict[str, Any]] = []
        self.on_send: Callable[[dict[str, Any]], Coroutine[Any, Any, None]] | None = None

    async def receive(self) -> dict[str, Any]:
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        if self.on_send is not None:
            await self.on_send(message)
        self.sent.append(message)

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent)

    async def read(self, stream: EventStream) -> bytes:
        scope = {"type": "http", "method": "POST", "path": "/stream"}
        await asyncio.wait_for(stream(scope, self.receive, self.send), 20)
        return self.body


async def events(generation: Scripted) -> AsyncGenerator[str, None]:
    async for _, delta in merge([generation]):  # type: ignore[list-item]
        yield json.dumps({"text": delta.text})
    yield DONE


def stream_of(generation: Scripted) -> EventStream:
    return EventStream(events(generation), [generation], "/stream")  # type: ignore[list-item]


def test_events_on_the_wire() -> None:
    async def run() -> Client:
        client = Client()
        await client.read(stream_of(Scripted("a", "line\nbreak")))
        return client

    client = asyncio.run(run())
    assert client.body == b'data: {"text": "a"}\n\ndata: {"text": "line\\nbreak"}\n\ndata: [DONE]\n\n'
    headers = dict(client.sent[0]["headers"])
    assert headers[b"content-type"].startswith(b"text/event-stream")
    assert headers[b"cache-control"] == b"no-cache"
    assert headers[b"x-accel-buffering"] == b"no"


@pytest.mark.parametrize(
    ("error", "message", "code"),
    [
        (ApiError(503, "the engine restarted", code="engine_restarted"), "the engine restarted", "engine_restarted"),
        (RuntimeError("secret"), "internal error", "internal_error"),
    ],
)
def test_an_error_in_the_middle_is_the_last_event(error: Exception, message: str, code: str) -> None:
    generation = Scripted("a", error)

    async def run() -> bytes:
        return await Client().read(stream_of(generation))

    first, second, rest = asyncio.run(run()).split(b"\n\n")
    assert first == b'data: {"text": "a"}'
    failure = json.loads(second.removeprefix(b"data: "))["error"]
    assert message in failure["message"]
    assert "secret" not in failure["message"]
    assert failure["code"] == code
    assert rest == b""
    assert generation.cancelled


def test_a_client_that_leaves_in_the_middle_cancels() -> None:
    async def run() -> tuple[Client, Scripted]:
        client, generation = Client(), Scripted("a", asyncio.Event(), "never")

        async def leave(message: dict[str, Any]) -> None:
            if message.get("body"):
                client.gone.set()

        client.on_send = leave
        await client.read(stream_of(generation))
        return client, generation

    client, generation = asyncio.run(run())
    assert client.body == b'data: {"text": "a"}\n\n'
    assert generation.cancelled
    assert generation.closed


def test_a_client_that_left_before_the_first_event_cancels() -> None:
    async def run() -> Scripted:
        client, generation = Client(), Scripted(asyncio.Event(), "never")
        client.gone.set()

        async def stuck(message: dict[str, Any]) -> None:
            await asyncio.Event().wait()

        client.on_send = stuck
        await client.read(stream_of(generation))
        return generation

    assert asyncio.run(run()).cancelled


def test_a_client_that_stops_reading_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "STALL_SECONDS", 0.05)

    async def run() -> Scripted:
        client, generation = Client(), Scripted("a", asyncio.Event(), "never")

        async def stuck(message: dict[str, Any]) -> None:
            if message.get("body"):
                await asyncio.Event().wait()

        client.on_send = stuck
        await client.read(stream_of(generation))
        return generation

    assert asyncio.run(run()).cancelled


def test_a_quiet_stream_is_kept_open_by_comments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "PING_SECONDS", 0.02)

    async def run() -> bytes:
        client, gate = Client(), asyncio.Event()

        async def open_gate(message: dict[str, Any]) -> None:
            if client.body.count(sse.PING) == 2:
                gate.set()

        client.on_send = open_gate
        return await client.read(stream_of(Scripted("a", gate, "b")))

    body = asyncio.run(run())
    assert body.startswith(b'data: {"text": "a"}\n\n: ping\n\n: ping\n\n')
    assert body.endswith(b'data: {"text": "b"}\n\ndata: [DONE]\n\n')
    assert body.replace(b": ping\n\n", b"").count(b"\n\n") == 3


@given(text=st.text())
def test_a_template_writes_what_its_model_would(text: str) -> None:
    def chunk(content: str) -> Completion:
        choice = CompletionChoice(index=1, text=content, logprobs=None, finish_reason=None, stop_reason=None)
        return Completion(id="cmpl-1", created=7, model='a "model"', choices=[choice])

    written = ChunkTemplate(chunk(ChunkTemplate.TEXT)).fill(text)
    assert written == chunk(text).model_dump_json().encode()
    assert b"\n" not in written


def request_of(client: Client) -> Request:
    return Request({"type": "http", "method": "POST", "path": "/", "headers": []}, client.receive)


def test_work_is_finished_for_a_client_that_waits() -> None:
    async def run() -> str:
        async def work() -> str:
            await asyncio.sleep(0)
            return "done"

        return await until_disconnect(request_of(Client()), work())

    assert asyncio.run(run()) == "done"


def test_errors_of_the_work_come_through() -> None:
    async def run() -> None:
        async def work() -> None:
            raise ApiError(429, "full")

        await until_disconnect(request_of(Client()), work())

    with pytest.raises(ApiError, match="full"):
        asyncio.run(run())


def test_work_for_a_client_that_left_is_cancelled_and_has_let_go_before_the_reply() -> None:
    log = []

    async def run() -> None:
        client = Client()

        async def work() -> None:
            try:
                client.gone.set()
                await asyncio.Event().wait()
            finally:
                await asyncio.sleep(0)
                log.append("let go")

        try:
            await until_disconnect(request_of(client), work())
        except ApiError as error:
            log.append(error.status)

    asyncio.run(run())
    assert log == ["let go", 499]


def test_the_docs_teach_every_route() -> None:
    app = FastAPI()
    for router in ROUTERS:
        app.include_router(router)
    paths = app.openapi()["paths"]
    assert len(paths) >= 17
    for path, operations in paths.items():
        for method, operation in operations.items():
            assert operation["tags"], path
            assert operation["summary"], path
            replies = operation["responses"]
            assert replies["4XX"]["content"]["application/json"]["schema"]["$ref"].endswith(
                ("/ErrorReply", "/GenerateErrorReply", "/MessageErrorReply")
            )
            assert "422" not in replies, path  # FastAPI's own shape, which this server never sends
            if method == "post" and not path.endswith("/cancel"):
                assert operation["requestBody"]["required"], path
