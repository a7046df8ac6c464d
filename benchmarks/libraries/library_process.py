"""The libraries that `libraries.py` compares, each loaded in a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.serving.peers import BENCH, PROJECT, Unavailable, install_openvino, openvino_model

GENERATE_BATCH = "transformers generate_batch"


@dataclass(frozen=True)
class Launch:
    """How a library's process is started, and what it is told on its command line."""

    command: tuple[str, ...]
    options: dict[str, Any]
    environment: dict[str, str] = field(default_factory=dict)


def _here(library: str, environment: dict[str, str] | None = None, **options: str) -> Callable[[str], Launch]:
    command = (sys.executable, "-m", "benchmarks.libraries.library_steps")
    variables = {"PYTHONPATH": str(PROJECT), **(environment or {})}
    return lambda model: Launch(command, {"library": library, "model": model, **options}, variables)


def _softbatch(quantization: str) -> Callable[[str], Launch]:
    """With the variables that `softbatch serve` sets."""
    return _here("softbatch", {"GOMP_SPINCOUNT": "20000", "THP_MEM_ALLOC_ENABLE": "1"}, quantization=quantization)


def _openvino(kind: str) -> Callable[[str], Launch]:
    """Installs and exports when called. Raises Unavailable."""

    def launch(model: str) -> Launch:
        python = install_openvino()
        exported = openvino_model(python, Path(model), kind)
        command = (str(python), "-m", "benchmarks.libraries.openvino_steps")
        return Launch(command, {"model": str(exported)}, {"PYTHONPATH": str(PROJECT)})

    return launch


LIBRARIES: dict[str, Callable[[str], Launch]] = {
    "softbatch": _softbatch("none"),
    "openvino": _openvino("fp16"),
    "transformers generate": _here("generate"),
    "softbatch-int8": _softbatch("int8"),
    "openvino-int8": _openvino("int8"),
    GENERATE_BATCH: _here("generate_batch"),
}


class Library:
    """A library loaded in a process of its own, which runs only between a question and its answer."""

    def __init__(self, name: str, launch: Launch, options: dict[str, Any]) -> None:
        self.name = name
        self.version = ""
        self._log = BENCH / "logs" / f"{name.replace(' ', '-')}.log"
        self._log.parent.mkdir(parents=True, exist_ok=True)
        # Not what this is started in: a folder there may shadow a package of the library's.
        self._directory = tempfile.TemporaryDirectory(prefix="bench-")
        kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [*launch.command, json.dumps({**options, **launch.options})],
                cwd=self._directory.name,
                env={**kept, "HF_HUB_OFFLINE": "1", **launch.environment},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def wait_until_loaded(self) -> None:
        """Raises Unavailable."""
        self.version = str(self._answer()["version"])
        self._process.send_signal(signal.SIGSTOP)

    def ask(self, first: int, count: int, length: int, outputs: int) -> dict[str, Any]:
        """What came of so many prompts of that length. Raises Unavailable."""
        assert self._process.stdin is not None
        self._process.send_signal(signal.SIGCONT)
        question = {"first": first, "count": count, "length": length, "outputs": outputs}
        with contextlib.suppress(BrokenPipeError):  # it has ended: the answer says so
            print(json.dumps(question), file=self._process.stdin, flush=True)
        answer = self._answer()
        self._process.send_signal(signal.SIGSTOP)
        return answer

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        self._directory.cleanup()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self.stop()
            last = self._log.read_text(errors="replace").strip().splitlines()[-1:]
            raise Unavailable(f"its process ended, see {self._log.relative_to(PROJECT)}: {last}")
        return dict(json.loads(line))
