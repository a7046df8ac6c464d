"""Limits of requests and connections on a server with small ones."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import httpx
import psutil
import pytest

from softbatch.prompt_store.manifest import ModelSpec
from tests.support.models import make_soft_prompt, save_prompt
from tests.support.servers import Server, error_of, running_server, stream_json


@pytest.fixture(scope="module")
def small_server(tiny_flags: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    flags = ("--max-model-len", "64", "--default-max-tokens", "7", "--max-header-bytes", "2048", "--head-timeout", "1")
    keys = ("--api-key", "one", "--api-key", "two", "--admin-key", "root")
    with running_server(tmp_path_factory.mktemp("small-server"), *tiny_flags, *flags, *keys) as server:
        yield server


class TestRequestsWithoutALimit:
    MESSAGES = ({"role": "user", "content": "Hello"},)

    def test_get_the_servers_default(self, small_server: Server) -> None:
        reply = small_server.post("/v1/chat/completions", {"messages": self.MESSAGES, "ignore_eos": True}).json()
        assert reply["choices"][0]["finish_reason"] == "length"
        assert reply["usage"]["completion_tokens"] == 7
        assert small_server.http.get("/info").json()["default_max_tokens"] == 7

    def test_as_a_stream_too(self, small_server: Server) -> None:
        body = {
            "messages": self.MESSAGES,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        events = stream_json(small_server, "/v1/chat/completions", body)
        assert events[-2]["usage"]["completion_tokens"] == 7
        assert events[-3]["choices"][0]["finish_reason"] == "length"

    def test_may_name_a_larger_one(self, small_server: Server) -> None:
        body = {"messages": self.MESSAGES, "ignore_eos": True, "max_tokens": 9}
        assert small_server.post("/v1/chat/completions", body).json()["usage"]["completion_tokens"] == 9

    def test_get_less_where_the_window_ends(self, small_server: Server) -> None:
        body = {"messages": [{"role": "user", "content": "a " * 20}], "ignore_eos": True}
        usage = small_server.post("/v1/chat/completions", body).json()["usage"]
        assert usage["total_tokens"] == min(64, usage["prompt_tokens"] + 7)


def test_heads_and_silence_are_bounded_and_counted(small_server: Server) -> None:
    reply = small_server.http.get("/health", headers={"X-Long": "x" * 3000})
    assert reply.status_code == 431
    assert reply.json()["error"]["code"] == "headers_too_large"
    # On a busy machine a client of another test may be as slow.
    before = small_server.metric("connections_refused_total", reason="head_timeout")
    with socket.create_connection(("127.0.0.1", small_server.port), timeout=30) as connection:
        assert connection.recv(1) == b""
    assert small_server.metric("connections_refused_total", reason="head_size") == 1
    assert small_server.metric("connections_refused_total", reason="head_timeout") >= before + 1
    assert small_server.metric("connections") >= 1


class TestKeys:
    def complete(self, server: Server, key: str, prompt: list[int], **fields: object) -> None:
        body = {"prompt": prompt, "max_tokens": 1, **fields}
        reply = httpx.post(f"{server.url}/v1/completions", json=body, headers={"Authorization": f"Bearer {key}"})
        assert reply.status_code == 200, reply.text

    def test_share_no_prefixes(self, small_server: Server) -> None:
        """Or the time of an answer would tell one key what another has asked."""
        prompt = list(range(100, 148))

        def hits() -> float:
            return small_server.metric("prefix_cache_hits_total")

        self.complete(small_server, "one", prompt)
        before = hits()
        self.complete(small_server, "one", prompt)
        own = hits() - before
        assert own >= 32
        self.complete(small_server, "two", prompt)
        self.complete(small_server, "root", prompt)
        self.complete(small_server, "two", prompt, cache_salt="x")
        assert hits() - before == own
        self.complete(small_server, "two", prompt)
        assert hits() - before == 2 * own

    def test_see_their_own_requests(self, small_server: Server) -> None:
        def queue(key: str) -> dict[str, Any]:
            found: dict[str, Any] = httpx.get(
                f"{small_server.url}/v1/queue", headers={"Authorization": f"Bearer {key}"}
            ).json()
            return found

        body = {"prompt": [1, 2, 3], "max_tokens": 60, "ignore_eos": True, "stream": True}
        with small_server.http.stream("POST", "/v1/completions", json=body) as reply:
            lines = reply.iter_lines()
            next(lines)
            found = {key: queue(key) for key in ("root", "two")}
        ended = found["two"]["others_running"] == 0  # a fast machine is through before it is asked; it is asked last
        assert found["two"]["running"] == []
        assert ended or len(found["root"]["running"]) == 1


class TestDisks:
    ROOT: ClassVar = {"Authorization": "Bearer root"}

    def test_a_full_one_refuses_uploads_and_keeps_nothing(
        self, small_server: Server, tiny_spec: ModelSpec, tmp_path: Path
    ) -> None:
        """A process that may write no larger files meets what it would on a full disk."""
        path = save_prompt(make_soft_prompt("kv", 900, tiny_spec), tmp_path, "large")
        limit = path.stat().st_size // 2
        server = psutil.Process(small_server.process.pid)
        before = server.rlimit(psutil.RLIMIT_FSIZE)
        server.rlimit(psutil.RLIMIT_FSIZE, (limit, before[1]))
        try:
            reply = self.upload(small_server, path)
            assert reply.status_code == 507, reply.text
            assert error_of(reply)["code"] == "disk_full"
        finally:
            server.rlimit(psutil.RLIMIT_FSIZE, before)
        assert not [file for file in small_server.store.iterdir() if file.suffix or "add" in file.name]
        assert self.upload(small_server, path).status_code == 201
        gone = httpx.delete(f"{small_server.url}/v1/soft_prompts/large", headers=self.ROOT)
        assert gone.status_code == 200

    def upload(self, server: Server, path: Path) -> httpx.Response:
        files = {"file": (path.name, path.read_bytes())}
        url = f"{server.url}/v1/soft_prompts"
        return httpx.post(url, data={"name": "large"}, files=files, headers=self.ROOT, timeout=60)
