"""Servers that are asked to end, that are forced to, and that are killed."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import httpx
import psutil
import pytest

from tests.e2e.conftest import StartServer
from tests.support.background import CHAT, COMPLETE, PROMPT, body, in_background, seen
from tests.support.servers import error_of, running_server, wait_for


def test_a_front_end_that_is_killed_leaves_nothing_behind_at_the_next_start(
    tiny_flags: tuple[str, ...], tmp_path: Path
) -> None:
    """Not even an engine that hangs at that moment."""
    store = tmp_path / "prompts"
    with running_server(tmp_path, *tiny_flags, store=store) as server:
        engine = server.engine()
        busy = in_background(server, COMPLETE, body(15000, stream=True))
        wait_for(lambda: busy.events, "the stream does not begin")
        engine.send_signal(signal.SIGSTOP)
        os.kill(server.process.pid, signal.SIGKILL)
        server.process.wait(timeout=60)
        psutil.wait_procs([engine], timeout=60)
        assert not engine.is_running(), "an engine without a front end"
        assert busy.result().broken is not None or "[DONE]" not in busy.events
        left = [*server.temp.glob("softbatch-*"), *store.glob(".leases-*")]
        assert len(left) == 2
        with running_server(tmp_path, *tiny_flags, store=store, env={"TMPDIR": str(server.temp)}):
            assert not any(path.exists() for path in left)


@pytest.mark.parametrize("signals", [1, 2], ids=["the drain's time is over", "a second signal"])
def test_a_forced_stop_answers_whom_it_cuts_off(
    start_server: StartServer, tiny_flags: tuple[str, ...], signals: int
) -> None:
    """The engine hangs meanwhile."""
    server = start_server(*tiny_flags, "--drain-timeout", "2" if signals == 1 else "200")
    whole = in_background(server, CHAT, {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 15000})
    stream = in_background(server, COMPLETE, body(15000, stream=True))
    wait_for(lambda: server.metric("requests_running") == 2, "the requests do not run")
    server.engine().send_signal(signal.SIGSTOP)
    started = time.monotonic()
    for _ in range(signals):
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
    assert server.wait_exit() == 1
    assert time.monotonic() - started < 15
    reply = whole.result().reply
    assert reply is not None
    assert reply.status_code == 503
    assert "stopped before" in error_of(reply)["message"]
    assert set(stream.result().events[-1]) == {"error"}
    assert "Traceback" not in server.log.read_text()


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
