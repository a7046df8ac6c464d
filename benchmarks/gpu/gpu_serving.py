"""A server process under load, and what its soft prompts save against whole contexts: for `gpu.py`."""

from __future__ import annotations

import http.client
import json
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.gpu_steps import changed
from softbatch.prompt_store.manifest import Manifest, ModelRef, ModelSpec
from softbatch.prompt_store.soft_prompt_file import SoftPrompt, save

START_SECONDS = 900
RAMP_SECONDS = 60


@dataclass(frozen=True)
class Load:
    """What the clients ask: each request a question of its own about one of `contexts` contexts."""

    contexts: int
    context_tokens: int
    virtual_tokens: int
    question_tokens: int
    answer_tokens: int
    concurrency: int
    seconds: float


class Server:
    """`softbatch serve` on a model's directory, with soft prompts in a store of its own."""

    def __init__(self, model: Path, store: Path, port: int, flags: list[str]) -> None:
        self.port = port
        self._log = tempfile.NamedTemporaryFile("w+", suffix=".log")  # noqa: SIM115
        command = [sys.executable, "-m", "softbatch", "serve", "--model", str(model), "--port", str(port)]
        self._process = subprocess.Popen([*command, "--prompt-store", str(store), *flags], stderr=self._log)
        deadline = time.monotonic() + START_SECONDS
        while True:
            with suppress(OSError):
                if self._get("/health/ready")[0] == 200:
                    return
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the server did not start: {Path(self._log.name).read_text()}")
            time.sleep(0.5)

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(60)
        self._log.close()

    def complete(self, connection: http.client.HTTPConnection, body: dict[str, Any]) -> dict[str, Any]:
        content = json.dumps(body | {"temperature": 0, "ignore_eos": True})
        connection.request("POST", "/v1/completions", content, {"Content-Type": "application/json"})
        reply: dict[str, Any] = json.loads(connection.getresponse().read())
        if "usage" not in reply:
            raise RuntimeError(f"the server refused: {reply}")
        return reply

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)

    def metric(self, name: str) -> float:
        found = re.search(rf"^softbatch_{name} (\S+)$", self._get("/metrics")[1], re.M)
        if found is None:
            raise RuntimeError(f"no metric {name}")
        return float(found[1])

    def _get(self, path: str) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read().decode()


def save_soft_prompts(store: Path, spec: ModelSpec, count: int, virtual_tokens: int) -> None:
    """Random keys and values: what they say does not change how long it takes."""
    store.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(1)
    for index in range(count):
        described = Manifest(
            kind="kv",
            num_virtual_tokens=virtual_tokens,
            model=ModelRef(name=spec.name, fingerprint=spec.fingerprint),
            source="benchmark",
            created_at=1_700_000_000,
            replaces="nothing",
        )
        shape = (spec.num_layers, virtual_tokens, spec.num_kv_heads, spec.head_dim)
        keys, values = (torch.randn(shape, generator=generator).bfloat16() for _ in range(2))
        save(SoftPrompt(described, keys=keys, values=values), store / f"context-{index}.safetensors")


def body_of(load: Load, soft: bool, request: int, vocabulary: int, context: int | None = None) -> dict[str, Any]:
    """Request number `request`, the same for both ways but for what stands for the context."""
    rng = random.Random(request)
    if context is None:
        context = rng.randrange(load.contexts)
    question = [rng.randrange(3, vocabulary) for _ in range(load.question_tokens)]
    if soft:
        return {"prompt": question, "max_tokens": load.answer_tokens, "soft_prompt": f"context-{context}"}
    words = random.Random(10_000_000 + context)
    before = [words.randrange(3, vocabulary) for _ in range(load.context_tokens)]
    return {"prompt": before + question, "max_tokens": load.answer_tokens}


def hot(server: Server, load: Load, soft: bool, vocabulary: int, block_bytes: int) -> dict[str, float]:
    """Requests per second over `load.seconds`, or until there is something to count, after one request per context has
    warmed the caches and every client, or for a minute at the most some of them, has had an answer; and the KV cache
    that each running request took, shared blocks counted once."""
    with ThreadPoolExecutor(load.concurrency) as pool:

        def warm_up(context: int) -> None:
            server.complete(server.connect(), body_of(load, soft, -1 - context, vocabulary, context))

        list(pool.map(warm_up, range(load.contexts)))
        numbers, lock, stop = iter(range(1 << 30)), threading.Lock(), threading.Event()
        done: list[float] = []

        def client() -> None:
            connection = server.connect()
            while not stop.is_set():
                with lock:
                    number = next(numbers)
                server.complete(connection, body_of(load, soft, number, vocabulary))
                done.append(time.perf_counter())

        clients = [pool.submit(client) for _ in range(load.concurrency)]
        ramp = time.perf_counter() + RAMP_SECONDS
        while len(done) < load.concurrency and time.perf_counter() < ramp:
            time.sleep(0.01)
        started = time.perf_counter()
        used: list[float] = []

        def is_enough() -> bool:
            return time.perf_counter() - started >= load.seconds and bool(used and done and done[-1] >= started)

        while not is_enough() and not any(one.done() for one in clients):
            time.sleep(min(0.5, load.seconds / 10))
            running = server.metric("requests_running")
            blocks = server.metric("kv_usage_ratio") * server.metric("kv_blocks")
            if running and blocks:
                used.append(blocks * block_bytes / running)
        ended = time.perf_counter()
        stop.set()
        for future in clients:
            future.result()
    finished = sum(1 for moment in done if started <= moment <= ended)
    return {
        "concurrency": load.concurrency,
        "requests_per_second": finished / (ended - started),
        "requests": finished,
        "kv_bytes_per_running_request": sum(used) / max(1, len(used)),
    }


def throughput(server: Server, prompts: list[list[int]], max_tokens: int) -> dict[str, float]:
    """All prompts at once, as `generate_batch` gets them."""

    def one(prompt: list[int]) -> int:
        reply = server.complete(server.connect(), {"prompt": prompt, "max_tokens": max_tokens})
        return int(reply["usage"]["completion_tokens"])

    runs = []
    with ThreadPoolExecutor(len(prompts)) as pool:
        for turn in range(2):
            asked = changed(prompts, turn)
            started = time.perf_counter()
            tokens = sum(pool.map(one, asked))
            runs.append((time.perf_counter() - started, tokens))
    seconds, tokens = min(runs)
    return {"tokens_per_second": tokens / seconds, "seconds": seconds, "first_run_seconds": runs[0][0]}
