"""A real server for other people's packages, which have an environment of their own (`make clients`)."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[2]
PYTHON = os.environ.get("SOFTBATCH_PYTHON", sys.executable)
EMBEDDED = "smollm2-135m"
READY_SECONDS = 600  # the first start of all compiles the kernels


@pytest.fixture(scope="session")
def url(serve: Callable[..., AbstractContextManager[str]]) -> Iterator[str]:
    """Of a server with the embedded model; SOFTBATCH_URL names one that runs already."""
    if known := os.environ.get("SOFTBATCH_URL"):
        yield known
        return
    with serve() as url:
        yield url


@pytest.fixture(scope="session")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., AbstractContextManager[str]]:
    """Starts `softbatch serve` with these flags; SOFTBATCH_MODEL names another model, served by the same name."""

    @contextmanager
    def running(*flags: str) -> Iterator[str]:
        directory = tmp_path_factory.mktemp("server")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        own = f"--port {port} --prompt-store {directory / 'prompts'} --served-model-name {EMBEDDED}"
        command = [PYTHON, "-m", "softbatch", "serve", *own.split(), *flags]
        with (directory / "log").open("wb") as log:
            process = subprocess.Popen(command, cwd=PROJECT, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            _wait_ready(f"http://127.0.0.1:{port}", process, directory / "log")
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(timeout=60)

    return running


@pytest.fixture(scope="session")
def model_directory() -> Path:
    """What transformers takes for the model: a GGUF file is converted once."""
    program = "import sys; from softbatch.scheduler.model.source import resolve; print(resolve(sys.argv[1]).path)"
    model = os.environ.get("SOFTBATCH_MODEL", EMBEDDED)
    found = subprocess.run([PYTHON, "-c", program, model], cwd=PROJECT, stdout=subprocess.PIPE, text=True, check=True)
    return Path(found.stdout.splitlines()[-1])


def _wait_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{url}/health/ready", timeout=10):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    pytest.fail(f"the server does not become ready:\n{log.read_text(errors='replace')[-4000:]}")


@pytest.fixture(autouse=True)
def no_other_service(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody's keys and addresses are taken from the environment of whoever runs the tests."""
    for name in list(os.environ):
        if name.startswith(("OPENAI_", "ANTHROPIC_", "HF_", "LANGCHAIN_", "LANGSMITH_", "LITELLM_")):
            monkeypatch.delenv(name)
    for name in ("LITELLM_LOCAL_MODEL_COST_MAP", "OPENAI_AGENTS_DISABLE_TRACING"):
        monkeypatch.setenv(name, "True")
