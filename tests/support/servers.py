"""A server as a user has it: `python -m server serve` as a process of its own, spoken to over HTTP."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

PROJECT = Path(__file__).resolve().parents[2]
# Generous: the first start of all may build the attention kernel, and machines that run tests are often busy.
READY_SECONDS = 240.0
TIMEOUT = httpx.Timeout(120.0)
T = TypeVar("T")
# Tests that only ask pass on replicas too: SOFTBATCH_TEST_COMMAND="ray-serve --replicas 2"
COMMAND = os.environ.get("SOFTBATCH_TEST_COMMAND", "serve").split()
TGI_ROUTES = {"/", "/generate", "/generate_stream"}
SERVER_ERRORS = {"overloaded", "generation"}


@dataclass
class Server:
    """A running server. `temp` is its directory for temporary files, `store` the one of its soft prompts."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path
    store: Path
    temp: Path
    api_key: str | None = None
    _client: httpx.Client | None = field(default=None, repr=False)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}

    @property
    def http(self) -> httpx.Client:
        if self._client is None:
            self._client = httpx.Client(base_url=self.url, headers=self.headers, timeout=TIMEOUT)
        return self._client

    def async_http(self) -> httpx.AsyncClient:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        return httpx.AsyncClient(base_url=self.url, headers=self.headers, timeout=TIMEOUT, limits=limits)

    def post(self, path: str, body: object) -> httpx.Response:
        return self.http.post(path, json=body)

    def complete(self, prompt: str | list[int], max_tokens: int, **fields: Any) -> str:
        """The greedy continuation."""
        body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0} | fields
        reply = self.post("/v1/completions", body)
        assert reply.status_code == 200, reply.text
        text: str = reply.json()["choices"][0]["text"]
        return text

    def upload(self, name: str, *files: Path) -> httpx.Response:
        with contextlib.ExitStack() as stack:
            parts = [("file", (file.name, stack.enter_context(file.open("rb")))) for file in files]
            return self.http.post("/v1/soft_prompts", data={"name": name}, files=parts)

    def metric(self, name: str, **labels: str) -> float:
        """A sample of /metrics, such as `requests_waiting` or `batch_size_count`; summed where labels are left open."""
        return self.metrics(name, **labels)[0]

    def metrics(self, *names: str, **labels: str) -> tuple[float, ...]:
        """Several samples of one scrape. Raises KeyError for a metric that is not there."""
        reply = self.http.get("/metrics")
        assert reply.status_code == 200, reply.text
        families = list(text_string_to_metric_families(reply.text))
        return tuple(_sample(families, f"softbatch_{name}", labels) for name in names)

    @property
    def is_idle(self) -> bool:
        return self.metrics("requests_waiting", "requests_running") == (0, 0)

    def wait_idle(self) -> None:
        wait_for(lambda: self.is_idle, "the server did not become idle")

    def wait_empty(self) -> None:
        """Nothing runs, nothing waits, no KV block is in use."""
        levels = ("requests_waiting", "requests_running", "kv_usage_ratio", "queue_tokens")
        wait_for(lambda: not any(self.metrics(*levels)), "the server did not become empty")

    def is_ready_or_gone(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health/ready", timeout=10).status_code == 200
        except httpx.HTTPError:
            return self.process.poll() is not None

    def engine(self) -> psutil.Process:
        return self.child("softbatch.scheduler.engine.process")

    def child(self, module: str) -> psutil.Process:
        """The one process of the front end that runs this module."""
        children = psutil.Process(self.process.pid).children()
        found = [child for child in children if module in child.cmdline()]
        assert len(found) == 1, found
        return found[0]

    @contextlib.contextmanager
    def standing_still(self) -> Iterator[None]:
        """Meanwhile the engine computes nothing, so that what runs does not end, nor what waits begin. The front end
        takes it for dead if that lasts."""
        engine = self.engine()
        engine.suspend()
        try:
            yield
        finally:
            engine.resume()

    def wait_exit(self) -> int:
        return self.process.wait(timeout=READY_SECONDS)

    def kill(self) -> None:
        """kill -9 of every process of the server at once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(timeout=60)


class Site:
    """A place with one server, which tests may end: whoever asks for it next gets another."""

    def __init__(self, start: Callable[..., Server]) -> None:
        self._start = start
        self._server: Server | None = None

    @property
    def server(self) -> Server:
        if self._server is None or self._server.process.poll() is not None:
            return self.start()
        return self._server

    def start(self, **options: Any) -> Server:
        """Another one, beside what is left of the one before."""
        self._server = self._start(**options)
        return self._server


def _sample(families: Sequence[Any], name: str, labels: Mapping[str, str]) -> float:
    for family in families:
        found = [s for s in family.samples if s.name == name and labels.items() <= s.labels.items()]
        # A counter with labels that never counted has no samples, but is announced.
        if found or family.name in (name, name.removesuffix("_total")):
            return float(sum(sample.value for sample in found))
    raise KeyError(name)


@contextlib.contextmanager
def running_server(
    directory: Path, *flags: str, env: Mapping[str, str] | None = None, store: Path | None = None
) -> Iterator[Server]:
    """Start a server and wait until it is ready; all of its processes are killed at the end."""
    # Not below `directory`: the paths of its sockets must stay short.
    temp = Path(tempfile.mkdtemp(prefix="sb-"))
    server = None
    try:
        server = _start(directory, flags, env or {}, store or directory / "prompts", temp)
        yield server
    finally:
        if server is not None:
            if server._client is not None:
                server._client.close()
            server.kill()
            # Shown by pytest when a test fails that started this server.
            print("\n".join(server.log.read_text(errors="replace").splitlines()[-60:]))
        shutil.rmtree(temp, ignore_errors=True)


def _start(directory: Path, flags: Sequence[str], env: Mapping[str, str], store: Path, temp: Path) -> Server:
    for attempt in range(5):
        port = free_port()
        log = directory / f"server-{attempt}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "softbatch",
                    *COMMAND,
                    "--port",
                    str(port),
                    "--prompt-store",
                    str(store),
                    *flags,
                ],
                cwd=PROJECT,
                env=environment(**{"TMPDIR": str(temp), **env}),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        key = flags[flags.index("--api-key") + 1] if "--api-key" in flags else None
        server = Server(process, port, log, store, temp, key)
        try:
            wait_for(server.is_ready_or_gone, "the server does not become ready", READY_SECONDS)
        except BaseException:
            server.kill()
            raise
        if process.returncode is None:
            return server
        if "cannot listen" not in log.read_text():  # somebody else took the port meanwhile
            break
    pytest.fail(f"the server ended with status {process.returncode}:\n{log.read_text()[-4000:]}")


def environment(**changes: str) -> dict[str, str]:
    """This process's, without settings of a server; one thread each, as several servers share the machine."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SOFTBATCH_")}
    return kept | {"OMP_NUM_THREADS": "1"} | changes


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_for(condition: Callable[[], T], what: str, seconds: float = 120.0) -> T:
    """What `condition` returns as soon as that is true; fails with `what` after `seconds`."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > deadline:
            pytest.fail(f"after {seconds:g} s: {what}")
        time.sleep(0.02)
    return found


def events_of(lines: Iterator[str]) -> Iterator[str]:
    """The data of each server-sent event; anything else than data and comments is an error."""
    for line in lines:
        if line.startswith("data: "):
            yield line.removeprefix("data: ")
        else:
            assert not line or line.startswith(":"), line


def error_of(reply: httpx.Response) -> dict[str, Any]:
    """The error in the one shape that all of them have, but those on text-generation-inference's routes."""
    body = reply.json()
    if reply.request.url.path in TGI_ROUTES:
        assert set(body) == {"error", "error_type", "param", "code"}, body
        kind = "server_error" if body["error_type"] in SERVER_ERRORS else "invalid_request_error"
        body = {"error": {"message": body["error"], "type": kind, "param": body["param"], "code": body["code"]}}
    assert set(body) == {"error"}, body
    error: dict[str, Any] = body["error"]
    assert set(error) == {"message", "type", "param", "code"}, error
    assert isinstance(error["message"], str)
    assert "Traceback" not in error["message"]
    assert str(PROJECT) not in error["message"]
    return error


def stream_json(server: Server, path: str, body: object) -> list[Any]:
    """All events of a stream that ends by itself; `[DONE]` stays a string."""
    with server.http.stream("POST", path, json=body) as reply:
        assert reply.status_code == 200, reply.read()
        assert reply.headers["content-type"].startswith("text/event-stream")
        return [event if event == "[DONE]" else json.loads(event) for event in events_of(reply.iter_lines())]


def check_refusal(status: int, stderr: str, parts: tuple[str, ...]) -> None:
    """Status 2, and the last line says it all."""
    assert status == 2, stderr
    assert "Traceback" not in stderr
    line = stderr.strip().splitlines()[-1]
    assert line.startswith("softbatch"), stderr
    for part in parts:
        assert part in line, line
    assert len(line) < 600
