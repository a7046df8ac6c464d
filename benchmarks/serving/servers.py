"""The servers of the benchmark: how each is started, suspended while others are measured, and asked for its KV use."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil

from benchmarks.machine import has_matrix_tiles
from benchmarks.serving.benched_model import BenchedModel
from benchmarks.serving.peers import BENCH, PROJECT, Unavailable, gguf, install_llama, install_vllm

START_SECONDS = 600.0
CORES = os.cpu_count() or 1
COLLECTOR_PORTS = 100  # above the servers'
VLLM_LENGTH = 8192  # vLLM refuses a model whose longest prompt its KV cache would not hold


@dataclass(frozen=True)
class Launch:
    """How a server is started. `soft_prompts`: it takes soft prompts in the place of contexts. `onlooker` runs beside
    it from its first answer on."""

    name: str
    model: BenchedModel
    command: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)
    soft_prompts: bool = False
    onlooker: tuple[str, ...] = ()


def softbatch(
    port: int, store: Path, model: BenchedModel, quantization: str = "none", kv_cache_dtype: str = "auto"
) -> Launch:
    """With the flags a user would choose for this load."""
    return _softbatch(PROJECT, "softbatch", port, store, model, quantization, kv_cache_dtype)


def softbatch_before(checkout: Path, port: int, store: Path, model: BenchedModel) -> Launch:
    """Another checkout of softbatch. Raises Unavailable."""
    for package in ("softbatch", "server"):  # older checkouts have no package of softbatch's name
        if (checkout / package / "__main__.py").exists():
            launch = _softbatch(checkout.resolve(), package, port, store, model)
            return replace(launch, name="softbatch-before")
    raise Unavailable(f"{checkout} is no checkout of softbatch")


def _softbatch(
    checkout: Path,
    package: str,
    port: int,
    store: Path,
    model: BenchedModel,
    quantization: str = "none",
    kv_cache_dtype: str = "auto",
) -> Launch:
    command = [sys.executable, "-m", package, "serve", "--port", str(port), "--dtype", "bfloat16"]
    command += ["--model", model.argument, "--served-model-name", model.name]
    command += ["--max-batch-size", "64", "--prompt-store", str(store)]
    command += ["--quantization", quantization, "--kv-cache-dtype", kv_cache_dtype]
    formats = [quantization] * (quantization != "none") + [f"kv-{kv_cache_dtype}"] * (kv_cache_dtype != "auto")
    name = "-".join(["softbatch", *formats])
    return Launch(name, model, tuple(command), {"PYTHONPATH": str(checkout)}, soft_prompts=True)


def softbatch_traced(port: int, store: Path, model: BenchedModel) -> Launch:
    """With a trace of each request, and the metrics beside it, sent to a collector."""
    collector = port + COLLECTOR_PORTS
    launch = softbatch(port, store, model)
    command = (*launch.command, "--otlp-endpoint", f"http://127.0.0.1:{collector}")
    return replace(launch, name="softbatch-traced", command=command, onlooker=_onlooker("collector", str(collector)))


def softbatch_watched(port: int, store: Path, model: BenchedModel) -> Launch:
    """With the console open."""
    onlooker = _onlooker("console", f"http://127.0.0.1:{port}")
    return replace(softbatch(port, store, model), name="softbatch-watched", onlooker=onlooker)


def _onlooker(*words: str) -> tuple[str, ...]:
    return (sys.executable, "-m", "benchmarks.serving.onlookers", *words)


def vllm(port: int, model: BenchedModel) -> Launch:
    """vLLM on the very weights that softbatch serves. Raises Unavailable."""
    python = install_vllm()
    command = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model.directory)]
    command += ["--served-model-name", model.name, "--dtype", "bfloat16", "--port", str(port)]
    command += ["--max-model-len", str(min(VLLM_LENGTH, _positions(model)))]
    threads = "0" if CORES == 1 else f"0-{CORES - 1}"
    variables = {"VLLM_CPU_KVCACHE_SPACE": "4", "VLLM_CPU_OMP_THREADS_BIND": threads, "VLLM_NO_USAGE_STATS": "1"}
    return Launch("vllm", model, tuple(command), variables)


def llama(port: int, model: BenchedModel, kind: str = "") -> Launch:
    """llama.cpp on the model's file as it is, or in the format `kind`.

    It has a slot for each of 64 requests of plain or short, and no store of old prompts, which here never come again.
    Raises Unavailable.
    """
    programs = install_llama()
    file = gguf(programs, model.gguf, kind) if kind else model.gguf
    command = [str(programs / "llama-server"), "--model", str(file), "--alias", model.name, "--port", str(port)]
    command += ["--parallel", "64", "--ctx-size", str(64 * 384), "--threads", str(CORES), "--cache-ram", "0"]
    if kind == "Q8_0" and has_matrix_tiles():
        command += ["--no-repack"]  # this build's products on Intel's matrix tiles end in an illegal instruction
    return Launch(f"llama.cpp-{kind or 'file'}", model, tuple(command))


class Server:
    """A running server; its log lies under `.bench/logs`."""

    def __init__(self, launch: Launch, port: int) -> None:
        self.launch = launch
        self.port = port
        self.log = BENCH / "logs" / f"{launch.name}-{launch.model.name}.log"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.ready_seconds = 0.0
        self._process: subprocess.Popen[bytes] | None = None
        self._onlooker: subprocess.Popen[bytes] | None = None
        # Not what the project is started in: a folder there may shadow a package of the peer's.
        self._directory = tempfile.TemporaryDirectory(prefix="bench-")

    @property
    def name(self) -> str:
        return self.launch.name

    @property
    def is_first_start(self) -> bool:
        """Whether the next start may have to compile what later ones find in a cache; softbatch changes too often for
        a mark to be worth much."""
        return self.launch.soft_prompts or not self._marker.exists()

    @property
    def _marker(self) -> Path:
        return self.log.with_suffix(".started")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Until it has answered a first request; `ready_seconds` is how long that took. Raises Unavailable."""
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", self.port))
            except OSError as error:
                raise Unavailable(f"{self.name}: port {self.port} is taken; choose others with --port") from error
        started = time.monotonic()
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SOFTBATCH_", "PYTHONPATH"))}
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                self.launch.command,
                cwd=self._directory.name,
                env={**kept, "HF_HUB_OFFLINE": "1", **self.launch.environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() - started > START_SECONDS:
                self.stop()
                last = self.log.read_text(errors="replace").strip().splitlines()[-1:]
                raise Unavailable(f"{self.name} does not start, see {self.log.relative_to(PROJECT)}: {last}")
            time.sleep(0.1)
        self.ready_seconds = time.monotonic() - started
        self._marker.touch()
        if self.launch.onlooker:
            self._onlooker = subprocess.Popen(self.launch.onlooker, cwd=PROJECT, stdin=subprocess.DEVNULL)

    def stop(self) -> None:
        if self._process is None:
            return
        self.resume()
        if self._onlooker is not None:
            self._onlooker.kill()
            self._onlooker.wait(30)
            self._onlooker = None
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(30)
        self._process = None

    def suspend(self) -> None:
        """An idle server must not take anything from the one that is measured."""
        for process in self._tree():
            with contextlib.suppress(psutil.Error):
                process.suspend()

    def resume(self) -> None:
        for process in reversed(self._tree()):
            with contextlib.suppress(psutil.Error):
                process.resume()

    def settle(self, seconds: float = 20.0) -> None:
        """Until it is idle again after requests were cut off."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            before = self._cpu_seconds()
            time.sleep(0.3)
            if self._cpu_seconds() - before < 0.03:
                return

    def kv_bytes_per_request(self, contexts: int) -> float | None:
        """KV memory that the running requests hold at this moment, divided by their number; None if none runs.

        Of soft prompts that lie in the cache only `contexts` count: the others serve other requests.
        """
        if self.launch.name != "vllm" and not self.launch.soft_prompts:
            return None
        text = self._get("/metrics")
        if self.launch.name == "vllm":
            running = _metric(text, "vllm:num_requests_running")
            blocks, size = (int(_label(text, label)) for label in ("num_gpu_blocks", "block_size"))
            used = _metric(text, "vllm:kv_cache_usage_perc") * blocks * size * _bytes_per_token(self.launch.model)
        else:
            running = _metric(text, "softbatch_requests_running")
            used = _metric(text, "softbatch_kv_usage_ratio") * _metric(text, "softbatch_kv_cache_bytes")
            resident, held = (_metric(text, f"softbatch_soft_prompts_resident{end}") for end in ("", "_bytes"))
            used -= held * (1 - min(1.0, contexts / resident)) if resident else 0.0
        return used / running if running else None

    def _get(self, path: str) -> str:
        with urllib.request.urlopen(self.url + path, timeout=30) as reply:
            return str(reply.read().decode())

    def _answers(self) -> bool:
        body = {"model": self.launch.model.name, "prompt": [1000, 2000, 3000], "max_tokens": 1, "temperature": 0}
        request = urllib.request.Request(
            f"{self.url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                return bool(reply.status == 200)
        except OSError:
            return False

    def _tree(self) -> list[psutil.Process]:
        if self._process is None:
            return []
        try:
            root = psutil.Process(self._process.pid)
            return [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def _cpu_seconds(self) -> float:
        total = 0.0
        for process in self._tree():
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                total += times.user + times.system
        return total


def _config(model: BenchedModel) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((model.directory / "config.json").read_text())
    return config


def _positions(model: BenchedModel) -> int:
    return int(_config(model)["max_position_embeddings"])


def _bytes_per_token(model: BenchedModel) -> int:
    """Keys and values of one token in bfloat16."""
    config = _config(model)
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return 2 * 2 * int(config["num_hidden_layers"]) * int(config["num_key_value_heads"]) * int(head_dim)


def _metric(text: str, name: str) -> float:
    found = re.search(rf"^{re.escape(name)}(?:\{{[^}}]*\}})? (\S+)$", text, re.M)
    if found is None:
        raise LookupError(f"there is no metric {name}")
    return float(found[1])


def _label(text: str, name: str) -> str:
    found = re.search(rf'^vllm:cache_config_info\{{.*\b{name}="([^"]*)"', text, re.M)
    if found is None:
        raise LookupError(f"vLLM's metrics do not say {name}")
    return found[1]
