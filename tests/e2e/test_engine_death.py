"""Processes that die, and processes that are asked to end."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from softbatch.prompt_store.manifest import ModelSpec
from tests.e2e.conftest import StartServer
from tests.support.models import Reference, make_soft_prompt, save_prompt
from tests.support.servers import Server, error_of, events_of, wait_for

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
        with httpx.Client(base_url=server.url, timeout=120) as client:
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


def test_a_killed_engine_is_started_again(
    start_server: StartServer, tiny_flags: tuple[str, ...], tiny_llama: Reference, tiny_spec: ModelSpec, tmp_path: Path
) -> None:
    server = start_server(*tiny_flags, "--max-batch-size", "4")
    prompt = make_soft_prompt("embeddings", 21, tiny_spec, scale=0.5)
    assert server.upload("manual", save_prompt(prompt, tmp_path, "manual")).status_code == 201
    ids = tiny_llama.tokenizer(PROMPT)["input_ids"]
    expected = [
        tiny_llama.tokenizer.decode(tiny_llama.generate(ids, 12, p), skip_special_tokens=True) for p in (prompt, None)
    ]
    answers = lambda: [server.complete(PROMPT, 12, model="manual"), server.complete(PROMPT, 12)]  # noqa: E731
    assert answers() == expected
    preempted = server.metric("generation_tokens_total")

    chat = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 15000, "ignore_eos": True, "stream": True}
    streams = [
        in_background(server, COMPLETE, body(15000, stream=True, model="manual")),
        in_background(server, CHAT, chat),
        # Cannot be told to ignore the end of the text, but is unlikely to meet it: see the check below.
        in_background(server, STREAM, {"inputs": PROMPT, "parameters": {"max_new_tokens": 15000}}),
    ]
    whole = in_background(server, COMPLETE, body(15000))
    wait_for(lambda: all(len(stream.events) > 2 for stream in streams), "a stream does not begin")
    wait_for(lambda: server.metric("requests_running") == 4, "not four run")
    waiting = in_background(server, COMPLETE, body(15000))
    wait_for(lambda: server.metrics("requests_running", "requests_waiting") == (4, 1), "not four run and one waits")

    dead = server.engine()
    os.kill(dead.pid, signal.SIGKILL)
    for request in (whole, waiting):
        reply = request.result().reply
        assert reply is not None
        assert reply.status_code == 503
        error = error_of(reply)
        assert (error["type"], error["code"]) == ("server_error", "engine_restarted")
        assert "send it again" in error["message"]
        assert int(reply.headers["retry-after"]) >= 1
    for stream in streams:
        events = stream.result().events
        assert stream.broken is None, stream.broken
        last = events[-1]
        # text-generation-inference's clients know a flat one.
        assert set(last) in ({"error"}, {"error", "error_type", "param", "code"})
        assert (last if "error_type" in last else last["error"])["code"] == "engine_restarted"
        assert "[DONE]" not in events
        assert all("error" not in event for event in events[:-1])

    health: list[int] = []
    wait_for(lambda: seen(health, lambda: status_of(server, "/health"), 503) or 200 in health, "no answer")
    assert health[-1] == 503, "the health check did not notice"
    assert status_of(server, "/health/live") == 200
    assert status_of(server, "/health/ready") == 503
    refused = server.post(COMPLETE, body(4))
    assert refused.status_code == 503
    assert "restarting" in error_of(refused)["message"]
    assert server.http.get("/v1/models").status_code == 200
    assert server.http.get("/v1/queue").json() == {"slots": 4, "running": [], "waiting": []}

    wait_for(lambda: status_of(server, "/health/ready") == 200, "the engine does not come back", 240)
    assert server.engine().pid != dead.pid
    assert server.metric("engine_restarts_total") == 1
    assert answers() == expected
    server.wait_idle()
    assert server.metric("requests_finished_total", reason="error") == 5
    assert server.metric("requests_rejected_total", reason="engine_away") >= 1
    assert server.metric("generation_tokens_total") >= preempted + 24
    assert server.http.delete("/v1/soft_prompts/manual").status_code == 200
    server.wait_empty()

    # The front end, killed: nobody is left behind.
    engine = server.engine()
    busy = in_background(server, COMPLETE, body(15000, stream=True))
    wait_for(lambda: busy.events, "the stream does not begin")
    os.kill(server.process.pid, signal.SIGKILL)
    server.process.wait(timeout=60)
    psutil.wait_procs([engine], timeout=60)
    assert not engine.is_running(), "an engine without a front end"
    assert busy.result().broken is not None or "[DONE]" not in busy.events


def test_a_server_that_is_told_to_stop_finishes_what_runs(
    start_server: StartServer, tiny_flags: tuple[str, ...]
) -> None:
    server = start_server(*tiny_flags, "--max-batch-size", "2")
    engine = server.engine()
    length = 1200
    stream = in_background(server, COMPLETE, body(length, stream=True))
    whole = in_background(server, COMPLETE, body(length))
    wait_for(lambda: server.metric("requests_running") == 2 and len(stream.events) > 2, "not two run")
    waiting = in_background(server, COMPLETE, body(30))
    wait_for(lambda: server.metrics("requests_running", "requests_waiting") == (2, 1), "not two run and one waits")
    # Service managers and terminals signal all processes of the group; the engine must leave that to the front end.
    engine.send_signal(signal.SIGINT)
    os.killpg(server.process.pid, signal.SIGTERM)

    # From now on new ones are answered with 503, then refused: there is no socket any more.
    replies: list[int] = []

    def ask() -> int:
        try:
            reply = httpx.post(server.url + COMPLETE, json=body(2), timeout=60)
        except httpx.HTTPError:
            return 0
        return reply.status_code

    wait_for(lambda: seen(replies, ask, 0), "the server still listens")
    assert set(replies) <= {0, 200, 503}
    assert replies.count(200) <= 1, "it takes requests although it was told to stop"
    assert stream.events[-1] != "[DONE]", "the requests were too short for this test"

    assert stream.result().events[-1] == "[DONE]"
    assert stream.broken is None
    text = "".join(event["choices"][0]["text"] for event in stream.events[:-1])
    for request in (whole, waiting):
        reply = request.result().reply
        assert reply is not None, request.broken
        assert reply.status_code == 200
    assert whole.reply is not None
    assert whole.reply.json()["usage"]["completion_tokens"] == length
    assert whole.reply.json()["choices"][0]["text"] == text
    assert server.wait_exit() == 0
    psutil.wait_procs([engine], timeout=60)
    assert not engine.is_running()
    assert not list(server.temp.glob("softbatch-*")), "temporary files stay behind"
    assert "Traceback" not in server.log.read_text()
