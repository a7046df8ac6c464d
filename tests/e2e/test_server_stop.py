"""Servers that are asked to end, and that are forced to."""

from __future__ import annotations

import os
import signal

import httpx
import psutil
import pytest

from tests.support.background import CHAT, COMPLETE, PROMPT, body, in_background, seen, status_of
from tests.support.servers import Site, error_of, wait_for


@pytest.mark.parametrize("signals", [1, 2], ids=["the drain's time is over", "a second signal"])
def test_a_forced_stop_answers_whom_it_cuts_off(async_site: Site, site_with_keys: Site, signals: int) -> None:
    """The engine hangs meanwhile."""
    server = async_site.server if signals == 1 else site_with_keys.server
    whole = in_background(server, CHAT, {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 15000})
    stream = in_background(server, COMPLETE, body(15000, stream=True))
    wait_for(lambda: server.metric("requests_running") == 2, "the requests do not run")
    server.engine().send_signal(signal.SIGSTOP)
    server.process.send_signal(signal.SIGTERM)
    if signals == 2:
        wait_for(lambda: status_of(server, "/health/ready") != 200, "it does not hear that it is to stop")
        server.process.send_signal(signal.SIGTERM)
    assert server.wait_exit() == 1
    reply = whole.result().reply
    assert reply is not None
    assert reply.status_code == 503
    assert "stopped before" in error_of(reply)["message"]
    assert set(stream.result().events[-1]) == {"error"}
    assert "Traceback" not in server.log.read_text()


def test_a_server_that_is_told_to_stop_finishes_what_runs(two_slots: Site) -> None:
    server = two_slots.server
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
