"""Requests that run in threads of their own while a test does something to the server."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.support.servers import Server, events_of

PROMPT = "Write a short story about an old clock"
COMPLETE, CHAT, STREAM = "/v1/completions", "/v1/chat/completions", "/generate_stream"


def body(max_tokens: int, **fields: Any) -> dict[str, Any]:
    return {"prompt": PROMPT, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True} | fields


@dataclass
class Background:
    """A request in a thread of its own: the events of a stream, or the reply."""

    events: list[Any] = field(default_factory=list)
    reply: httpx.Response | None = None
    broken: Exception | None = None
    thread: threading.Thread | None = None

    def result(self) -> Background:
        assert self.thread is not None
        self.thread.join(timeout=120)
        assert not self.thread.is_alive(), "the request never ended"
        return self


def in_background(server: Server, route: str, content: dict[str, Any]) -> Background:
    request = Background()

    def ask() -> None:
        with httpx.Client(base_url=server.url, headers=server.headers, timeout=120) as client:
            try:
                if route != STREAM and not content.get("stream"):
                    request.reply = client.post(route, json=content)
                    return
                with client.stream("POST", route, json=content) as reply:
                    assert reply.status_code == 200
                    for event in events_of(reply.iter_lines()):
                        request.events.append(event if event == "[DONE]" else json.loads(event))
            except Exception as error:
                request.broken = error

    request.thread = threading.Thread(target=ask, daemon=True)
    request.thread.start()
    return request


def status_of(server: Server, path: str) -> int:
    """0 when nobody answers."""
    try:
        return httpx.get(server.url + path, timeout=30).status_code
    except httpx.HTTPError:
        return 0


def seen(values: list[int], probe: Callable[[], int], wanted: int) -> bool:
    values.append(probe())
    return values[-1] == wanted
