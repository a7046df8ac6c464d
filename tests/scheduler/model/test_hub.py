"""Hub ids that cannot be had are refused in a line, within seconds; what lies in the hub's cache is found."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.support.servers import PROJECT

PROGRAM = """
import sys
from softbatch.scheduler.model import hub, source

hub.TIMEOUT_SECONDS = 1.0
for model in sys.argv[1:]:
    try:
        print("found", source.resolve(model).path)
    except source.ModelError as error:
        print("refused", error)
"""


class Hub(BaseHTTPRequestHandler):
    """Has one model."""

    def do_GET(self) -> None:
        is_there = self.path.endswith("/models/somebody/there")
        body = b'{"id": "somebody/there", "siblings": []}' if is_there else b"{}"
        self.send_response(200 if is_there else 404)
        if not is_there:
            self.send_header("X-Error-Code", "GatedRepo" if "gated" in self.path else "RepoNotFound")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def silent() -> Iterator[str]:
    """A hub that accepts connections and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def resolved(endpoint: str, home: Path, *models: str) -> list[str]:
    """A line for each of them, all from one process: the hub's address is read when its package is imported."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *models],
        cwd=PROJECT,
        env={**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    found = done.stdout.splitlines()
    assert len(found) == len(models), found
    return found


def test_ids_that_the_hub_knows(hub: str, tmp_path: Path) -> None:
    there, nothing, gated = resolved(hub, tmp_path, "somebody/there", "nobody/nothing", "somebody/gated")
    assert there == "found somebody/there"
    assert "refused --model nobody/nothing: the hub has no such model" in nothing
    assert "whom its owner allows" in gated


def test_a_hub_that_cannot_be_reached(silent: str, tmp_path: Path) -> None:
    for endpoint in (silent, "http://127.0.0.1:9"):
        (found,) = resolved(endpoint, tmp_path, "nobody/nothing")
        assert found.startswith("refused --model nobody/nothing: the hub cannot be reached"), found


def test_the_hubs_cache_serves_without_it(tmp_path: Path) -> None:
    kept = tmp_path / "hub" / "models--somebody--kept"
    snapshot = kept / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text("0" * 40)
    assert resolved("http://127.0.0.1:9", tmp_path, "somebody/kept") == [f"found {snapshot}"]
