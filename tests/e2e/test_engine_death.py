"""The engine's death, by signal and by hanging, is a pause for every client."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from softbatch.prompt_store.manifest import ModelSpec
from tests.e2e.conftest import StartServer
from tests.support.background import COMPLETE, PROMPT, body, in_background, status_of
from tests.support.mixed_requests import (
    EMBEDDINGS,
    KEYS_AND_VALUES,
    MixedRequest,
    answers_of,
    difference,
    is_error,
    mixed_requests,
)
from tests.support.models import make_soft_prompt, save_prompt
from tests.support.servers import Server, error_of, running_server, wait_for


@pytest.fixture(scope="module")
def mixed_server(
    tiny_flags: tuple[str, ...], tiny_spec: ModelSpec, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """Six slots, a queue, and a soft prompt of each kind."""
    directory = tmp_path_factory.mktemp("mixed-server")
    flags = ("--max-batch-size", "6", "--step-timeout", "4")
    with running_server(directory, *tiny_flags, *flags) as server:
        for name, kind in ((EMBEDDINGS, "embeddings"), (KEYS_AND_VALUES, "kv")):
            prompt = make_soft_prompt(kind, 21, tiny_spec, scale=0.5)
            assert server.upload(name, save_prompt(prompt, directory, name)).status_code == 201
        yield server


@pytest.fixture(scope="module")
def undisturbed(mixed_server: Server) -> tuple[list[MixedRequest], list[Any]]:
    requests = mixed_requests(18, 50)
    answers = asyncio.run(answers_of(mixed_server, requests))
    assert not any(map(is_error, answers)), answers
    return requests, answers


def disturbed(server: Server, requests: list[MixedRequest], disturb: Callable[[], object]) -> list[Any]:
    """The answers that come while `disturb` runs in the midst of them."""
    with ThreadPoolExecutor(1) as thread:
        answers = thread.submit(lambda: asyncio.run(answers_of(server, requests)))
        before = server.metric("generation_tokens_total")
        wait_for(lambda: server.metric("generation_tokens_total") > before + 100, "nothing is generated")
        disturb()
        return answers.result(timeout=240)


def check_same(requests: list[MixedRequest], answers: list[Any], expected: list[Any]) -> None:
    """Log-probabilities may differ in their last bits: another batch adds up in another order."""
    for request, answer, right in zip(requests, answers, expected, strict=True):
        assert difference(answer, right, 1e-4) is None, (request, difference(answer, right, 1e-4))


def kill_engine(server: Server) -> None:
    server.engine().send_signal(signal.SIGKILL)


def restarts(server: Server) -> float:
    return server.metric("engine_restarts_total")


def test_a_killed_engine_is_a_pause_for_every_kind_of_request(
    mixed_server: Server, undisturbed: tuple[list[MixedRequest], list[Any]]
) -> None:
    server, (requests, expected) = mixed_server, undisturbed
    late: list[str] = []

    def kill_twice() -> None:
        dead, before = server.engine(), restarts(server)
        kill_engine(server)
        wait_for(lambda: status_of(server, "/health/ready") == 503, "nobody notices")
        assert status_of(server, "/health") == 503
        assert status_of(server, "/health/live") == 200
        assert server.http.get("/v1/queue").json()["running"] == []
        # Who comes now waits for the next engine.
        late.append(server.complete(PROMPT, 12))
        assert server.engine().pid != dead.pid
        assert restarts(server) == before + 1
        wait_for(lambda: server.metric("requests_running") == 6, "the requests do not go on")
        kill_engine(server)

    before, resumed = server.metrics("engine_restarts_total", "requests_resumed_total")
    check_same(requests, disturbed(server, requests, kill_twice), expected)
    assert late == [server.complete(PROMPT, 12)]
    assert restarts(server) == before + 2
    assert server.metric("requests_resumed_total") >= resumed + 12
    assert server.metric("requests_finished_total", reason="error") == 0
    server.wait_idle()
    wait_for(lambda: server.metric("queue_tokens") == 0, "something is left in the queue")


def test_an_engine_that_hangs_is_replaced(
    mixed_server: Server, undisturbed: tuple[list[MixedRequest], list[Any]]
) -> None:
    server, (requests, expected) = mixed_server, undisturbed
    before = restarts(server)
    stopped = server.engine()
    answers = disturbed(server, requests, lambda: stopped.send_signal(signal.SIGSTOP))
    check_same(requests, answers, expected)
    assert restarts(server) == before + 1
    assert not stopped.is_running()


def test_a_request_that_kills_engines_is_found_and_its_companions_are_served(
    mixed_server: Server,
) -> None:
    """The test stands in for the fault: whenever the request runs, it kills the engine."""
    server = mixed_server
    expected = server.complete(PROMPT, 200, ignore_eos=True)
    companions = [in_background(server, COMPLETE, body(200)) for _ in range(3)]
    poison = in_background(server, COMPLETE, body(15000, priority=7))
    before = restarts(server)
    deaths = 0
    while poison.thread is not None and poison.thread.is_alive():
        queue = server.http.get("/v1/queue").json()
        if any(entry["priority"] == 7 for entry in queue["running"]):
            kill_engine(server)
            deaths += 1
            wait_for(lambda: status_of(server, "/health/ready") == 503, "nobody notices")
        time.sleep(0.02)
    assert poison.reply is not None
    assert poison.reply.status_code == 500
    assert error_of(poison.reply)["code"] == "request_kills_engine"
    assert deaths == 3
    for companion in companions:
        reply = companion.result().reply
        assert reply is not None
        assert reply.status_code == 200, reply.text
        assert reply.json()["choices"][0]["text"] == expected
    wait_for(lambda: restarts(server) == before + 3, "no other engine is started")


def test_an_engine_that_dies_too_often_ends_the_server(start_server: StartServer, tiny_flags: tuple[str, ...]) -> None:
    server = start_server(*tiny_flags, "--max-engine-deaths", "2")
    stream = in_background(server, COMPLETE, body(15000, stream=True))
    whole = in_background(server, COMPLETE, body(15000))
    for _ in range(2):
        wait_for(lambda: server.metric("requests_running") == 2, "the requests do not run")
        kill_engine(server)
        wait_for(lambda: status_of(server, "/health/ready") != 200, "nobody notices")
    assert server.wait_exit() == 1
    reply = whole.result().reply
    assert reply is not None
    assert reply.status_code == 503
    assert error_of(reply)["code"] == "engine_gone"
    assert "died 2 times" in error_of(reply)["message"]
    assert stream.result().events[-1]["error"]["code"] == "engine_gone"
    assert "Traceback" not in server.log.read_text()


def test_another_engine_never_serves_another_model(
    start_server: StartServer, tiny_flags: tuple[str, ...], tmp_path: Path
) -> None:
    """Nor the same one with another chat template, which counts as part of it."""
    template = tmp_path / "mine.jinja"
    template.write_text("{% for m in messages %}<{{ m.content }}>{% endfor %}")
    server = start_server(*tiny_flags, "--chat-template", str(template))
    chat = {"messages": [{"role": "user", "content": "Why?"}]}
    shown = server.http.post("/tokenize", json=chat | {"add_special_tokens": False}).json()
    plain = server.http.post("/tokenize", json={"prompt": "<Why?>", "add_special_tokens": False}).json()
    assert shown["tokens"] == plain["tokens"]
    whole = in_background(server, COMPLETE, body(15000))
    wait_for(lambda: server.metric("requests_running") == 1, "the request does not run")
    template.write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    kill_engine(server)
    assert server.wait_exit() == 1
    reply = whole.result().reply
    assert reply is not None
    assert reply.status_code == 503
    assert "files have changed" in error_of(reply)["message"]
