"""What a connection may take before anybody knows who is there: heads, time and places, against uvicorn itself."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
import uvicorn
from fastapi import FastAPI, Request
from starlette.responses import StreamingResponse

from softbatch.server.http.connections import ConnectionBounds, Connections
from softbatch.server.http.errors import ApiError
from softbatch.server.http.request_log import RequestLogMiddleware
from softbatch.server.http.sse import EventStream
from softbatch.server.observability.metrics import Metrics
from tests.support.servers import wait_for

BOUNDS = ConnectionBounds(
    max_connections=20,
    max_connections_per_address=8,
    max_header_bytes=4096,
    max_headers=20,
    head_timeout=0.4,
    body_timeout=0.4,
)
GET = b"GET / HTTP/1.1\r\nHost: x\r\n"
POST = b"POST / HTTP/1.1\r\nHost: x\r\n"


class BoundedServer:
    """uvicorn with bounded connections around a small app, in a thread."""

    def __init__(self, bounds: ConnectionBounds = BOUNDS) -> None:
        self.metrics = Metrics()
        app = FastAPI()
        app.add_middleware(RequestLogMiddleware)

        @app.get("/")
        async def fine() -> str:
            return "fine"

        @app.post("/")
        async def length(request: Request) -> int:
            return len(await request.body())

        @app.get("/slow")
        async def slow() -> StreamingResponse:
            async def parts():  # type: ignore[no-untyped-def]
                for _ in range(6):
                    await asyncio.sleep(0.2)
                    yield b"part"

            # As streams of events have it.
            return StreamingResponse(parts(), headers={"Connection": "keep-alive"})

        @app.get("/failing")
        async def failing() -> EventStream:
            async def events():  # type: ignore[no-untyped-def]
                yield "1"
                raise ApiError(503, "not now")

            return EventStream(events(), (), "/v1/completions")

        connections = Connections(bounds, self.metrics)
        config = uvicorn.Config(
            app,
            http=connections.protocol(),
            ws="none",
            lifespan="off",
            log_config=None,
            timeout_keep_alive=1,
            callback_notify=connections.sweep,
            timeout_notify=0,
        )
        self._server = uvicorn.Server(config)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self._thread = threading.Thread(target=self._server.run, args=([self.listener],), daemon=True)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join()

    def connect(self) -> socket.socket:
        return socket.create_connection(self.listener.getsockname(), timeout=10)

    def refused(self, reason: str) -> float:
        return self.metrics.connections_refused.labels(reason)._value.get()  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def server() -> Iterator[BoundedServer]:
    bounded = BoundedServer()
    yield bounded
    bounded.stop()


def answer(connection: socket.socket) -> tuple[int, bytes]:
    """The status and the body of all that comes until the server closes; status 0 if nothing does."""
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while chunk := connection.recv(65536):
            received += chunk
    head, _, body = received.partition(b"\r\n\r\n")
    return (int(head.split()[1]) if head else 0), body


def id_of(connection: socket.socket) -> tuple[int, str]:
    """The status of an answer, and the id of its request."""
    received = b""
    while chunk := connection.recv(65536):
        received += chunk
    head = received.partition(b"\r\n\r\n")[0].decode().lower()
    return int(head.split()[1]), dict(line.split(": ", 1) for line in head.split("\r\n")[1:])["x-request-id"]


def code_of(body: bytes) -> str:
    parsed = json.loads(body)
    # Once the path is known, text-generation-inference's clients get the error as they know it.
    error = parsed if "error_type" in parsed else parsed["error"]
    assert {"type", "error_type"} & set(error)
    return str(error["code"])


class TestHeads:
    @pytest.mark.parametrize(
        "head",
        [
            GET + b"X-Long: " + b"x" * 4096 + b"\r\n\r\n",
            b"GET /" + b"x" * 4096 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
            GET + b"".join(b"X-%d: 1\r\n" % i for i in range(20)) + b"\r\n",
            POST + b"X-Long: " + b"x" * 4096 + b"\r\nContent-Length: 2\r\n\r\n{}",
        ],
        ids=["one long header", "a long address", "many headers", "before a body"],
    )
    def test_too_large(self, server: BoundedServer, head: bytes) -> None:
        before = server.refused("head_size")
        with server.connect() as connection:
            connection.sendall(head)
            status, body = answer(connection)
        assert (status, code_of(body)) == (431, "headers_too_large")
        assert server.refused("head_size") == before + 1

    @pytest.mark.parametrize("piece", [b"x" * 1000, b"x: y\r\n" * 3], ids=["one header", "many headers"])
    def test_that_never_end_are_not_taken_in(self, server: BoundedServer, piece: bytes) -> None:
        sent = 0
        with server.connect() as connection:
            connection.sendall(GET + b"X-Long: ")
            with contextlib.suppress(OSError):
                while sent < 50_000_000:
                    sent += connection.send(piece)
                    time.sleep(0.001)
        assert sent < 4_000_000

    def test_as_large_as_allowed_with_a_large_body(self, server: BoundedServer) -> None:
        head = POST + b"X-Long: " + b"x" * 3500 + b"\r\nContent-Length: 200000\r\nConnection: close\r\n\r\n"
        with server.connect() as connection:
            connection.sendall(head + b"y" * 200_000)
            assert answer(connection) == (200, b"200000")


class TestTime:
    def test_a_head_that_does_not_come(self, server: BoundedServer) -> None:
        with server.connect() as connection:
            assert answer(connection) == (0, b"")

    def test_a_head_that_comes_byte_by_byte(self, server: BoundedServer) -> None:
        head, sent = GET * 20, 0
        with server.connect() as connection:
            connection.settimeout(0.05)
            with contextlib.suppress(OSError):
                while sent < len(head):
                    sent += connection.send(head[sent : sent + 1])
                    with contextlib.suppress(TimeoutError):
                        if b"408" in connection.recv(100):
                            break
        assert sent < len(head)

    def test_a_body_that_does_not_end(self, server: BoundedServer) -> None:
        with server.connect() as connection:
            connection.sendall(POST + b"Content-Length: 10\r\n\r\nabc")
            status, body = answer(connection)
        assert (status, code_of(body)) == (408, "request_timeout")
        assert server.refused("body_timeout") >= 1

    def test_a_body_that_comes_slowly_but_steadily(self, server: BoundedServer) -> None:
        with server.connect() as connection:
            connection.sendall(POST + b"Content-Length: 240000\r\nConnection: close\r\n\r\n")
            for _ in range(6):
                connection.sendall(b"y" * 40_000)
                time.sleep(0.2)
            assert answer(connection) == (200, b"240000")

    def test_a_long_answer_is_not_cut(self, server: BoundedServer) -> None:
        """Not even when the client has sent an empty line behind its request, or half of the next one."""
        for rest in (b"", b"\r\n", b"GET / HT"):
            with server.connect() as connection:
                connection.sendall(GET.replace(b"/", b"/slow", 1) + b"\r\n" + rest)
                received = b""
                while b"0\r\n\r\n" not in received:
                    chunk = connection.recv(65536)
                    assert chunk, received
                    received += chunk
            assert received.count(b"part") == 6

    def test_an_idle_connection_is_closed_without_a_word(self, server: BoundedServer) -> None:
        for rest in (b"", b"\r\n"):
            with server.connect() as connection:
                connection.sendall(GET + b"\r\n")
                assert connection.recv(65536).startswith(b"HTTP/1.1 200")
                connection.sendall(rest)
                assert connection.recv(65536) == b""


def test_http_1_0_gets_streams_without_chunks(server: BoundedServer) -> None:
    """Its clients know no chunks, and do not go on with a connection whose stream has no length."""
    heads = []
    for path, body in ((b"/slow", b"part" * 6), (b"/", b'"fine"')):
        with server.connect() as connection:
            connection.sendall(b"GET %b HTTP/1.0\r\nConnection: keep-alive\r\n\r\n" % path)
            received = b""
            while chunk := connection.recv(65536):
                received += chunk
        head, _, rest = received.partition(b"\r\n\r\n")
        heads.append(head.lower())
        assert rest == body
        assert b"transfer-encoding" not in heads[-1]
        assert heads[-1].count(b"connection:") == heads[-1].count(b"connection: close") == 1
    assert b"content-length: 6" in heads[1]


def test_places_of_an_address() -> None:
    """Of a server that waits for as long as this takes."""
    server = BoundedServer(replace(BOUNDS, head_timeout=300))
    with contextlib.ExitStack() as held:
        for _ in range(8):
            held.enter_context(server.connect())
        with server.connect() as connection:
            status, body = answer(connection)
            assert (status, code_of(body)) == (503, "too_many_connections")
    assert server.refused("address") >= 1

    def is_taken_in() -> bool:
        with server.connect() as connection:
            connection.sendall(GET + b"Connection: close\r\n\r\n")
            return answer(connection)[0] == 200

    wait_for(is_taken_in, "the places are still taken")
    server.stop()


ID = b"X-Request-Id: mine-7\r\n"


@pytest.mark.parametrize(
    ("sent", "answered"),
    [
        (GET + ID + b"X-Long: " + b"x" * 4096 + b"\r\n\r\n", 431),
        (GET + ID + b"X-1: 1\r\n" * 20, 431),
        (GET + ID + b"X-Slow: ", 408),
        (POST + ID + b"Content-Length: 10\r\n\r\nabc", 408),
        (GET + ID + b"Content-Length: many\r\n\r\n", 400),
    ],
    ids=["a long head", "many headers", "a slow head", "a slow body", "no HTTP"],
)
def test_what_never_comes_to_the_app_is_answered_under_its_id(
    server: BoundedServer, sent: bytes, answered: int
) -> None:
    with server.connect() as connection:
        connection.sendall(sent)
        assert id_of(connection) == (answered, "mine-7")
    with server.connect() as connection:
        connection.sendall(sent.replace(ID, b"X-Request-Id: not one\r\n"))
        status, made = id_of(connection)
    assert (status, len(made)) == (answered, 32)


def test_a_request_has_one_id_in_its_answer_and_in_the_log(
    server: BoundedServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="softbatch.server.http.request_log")
    with server.connect() as connection:
        connection.sendall(POST + b"Content-Length: 10\r\n\r\nabc")
        status, made = id_of(connection)
    assert status == 408
    wait_for(
        lambda: any(getattr(record, "fields", {}).get("id") == made for record in caplog.records),
        "the log has no line of this id",
    )


def test_what_is_no_http_has_the_shape_of_all_errors(server: BoundedServer) -> None:
    with server.connect() as connection:
        connection.sendall(b"\x16\x03\x01 hello\r\n\r\n")
        status, body = answer(connection)
    assert (status, code_of(body)) == (400, "invalid_http")


def test_a_stream_that_fails_leaves_its_connection_to_the_next_request(server: BoundedServer) -> None:
    """As clients with a pool of connections send it: at once, again and again."""

    def ask(connection: socket.socket, path: bytes, end: bytes) -> bytes:
        connection.sendall(b"GET %b HTTP/1.1\r\nHost: x\r\n\r\n" % path)
        received = b""
        while not received.endswith(end):
            chunk = connection.recv(65536)
            assert chunk, received
            received += chunk
        return received

    with server.connect() as connection:
        for _ in range(30):
            failed = ask(connection, b"/failing", b"\r\n0\r\n\r\n")
            assert b"data: 1" in failed
            assert b"not now" in failed
            assert b"connection: close" not in failed.lower()
            assert ask(connection, b"/", b'"fine"').startswith(b"HTTP/1.1 200")
