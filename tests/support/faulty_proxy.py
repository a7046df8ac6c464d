"""An HTTP proxy before an S3 server: slow, hanging, answering 500, cutting short, flipping bits, or hanging up."""

from __future__ import annotations

import contextlib
import http.client
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal
from urllib.parse import urlsplit

Fault = Literal["slow", "500", "reset", "truncate", "flip", "garble", "lost", "denied", "hang"]
SLOW_SECONDS = 0.3


class FaultyProxy:
    """`choose` says what happens to a request, by its method and path; `asked` counts requests, `done` faults."""

    def __init__(self, target: str) -> None:
        self.target = urlsplit(target).netloc
        self.choose: Callable[[str, str], Fault | None] = lambda method, path: None
        self.asked: Counter[str] = Counter()
        self.done: Counter[str] = Counter()
        self.refuses_conditions = False  # of writes
        self.compares_unquoted = False
        self.endpoint = ""
        self.release = threading.Event()  # ends those that hang

    def condition_answer(self, headers: Message) -> tuple[int, list[tuple[str, str]], bytes] | None:
        """To a write under a condition, by a store that does not take it as S3 does."""
        if self.refuses_conditions and ("If-Match" in headers or "If-None-Match" in headers):
            return 501, [("Content-Type", "application/xml")], b"<Error><Code>NotImplemented</Code></Error>"
        if self.compares_unquoted and '"' in headers.get("If-Match", ""):
            return 412, [("Content-Type", "application/xml")], b"<Error><Code>PreconditionFailed</Code></Error>"
        return None


def flipped(content: bytes) -> bytes:
    """With one bit of it changed."""
    at = random.randrange(len(content))
    return content[:at] + bytes([content[at] ^ (1 << random.randrange(8))]) + content[at + 1 :]


@contextlib.contextmanager
def running_proxy(target: str) -> Iterator[FaultyProxy]:
    proxy = FaultyProxy(target)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            proxy.asked[self.command] += 1
            fault = proxy.choose(self.command, self.path)
            if fault is not None:
                proxy.done[fault] += 1
            if fault == "reset":
                return self.hang_up()
            if fault == "hang":
                proxy.release.wait(30)
                return self.hang_up()
            if fault == "500":
                return self.send(
                    500, [("Content-Type", "application/xml")], b"<Error><Code>InternalError</Code></Error>"
                )
            if fault == "denied":
                return self.send(403, [], b"<Error><Code>AccessDenied</Code></Error>")
            if self.command == "PUT" and (answer := proxy.condition_answer(self.headers)) is not None:
                return self.send(*answer)
            if fault == "slow":
                time.sleep(SLOW_SECONDS)
            if fault == "garble" and self.command == "PUT":
                body = flipped(body)
            upstream = http.client.HTTPConnection(proxy.target, timeout=30)
            upstream.request(self.command, self.path, body, dict(self.headers.items()))
            reply = upstream.getresponse()
            content, headers = reply.read(), reply.getheaders()
            upstream.close()
            if fault == "lost":  # it was done, but nobody hears of it
                return self.hang_up()
            if fault == "flip" and content:
                content = flipped(content)
            self.send(reply.status, headers, content, cut=fault == "truncate")

        def send(self, status: int, headers: list[tuple[str, str]], content: bytes, cut: bool = False) -> None:
            self.send_response_only(status)
            for name, value in headers:
                if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                    self.send_header(name, value)
            length = {name.lower(): value for name, value in headers}.get("content-length", str(len(content)))
            self.send_header("Content-Length", length if self.command == "HEAD" else str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content[: len(content) // 2] if cut else content)
            if cut:
                self.hang_up()

        def hang_up(self) -> None:
            self.close_connection = True
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)

        def log_message(self, format: str, *args: object) -> None:
            pass

        do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = answer

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    proxy.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.release.set()
        server.shutdown()
        server.server_close()
