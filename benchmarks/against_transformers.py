"""softbatch through HTTP beside plain transformers: same weights, same threads, one run.

Closed loop: at concurrency c, c clients each send one request after the other. Peers: `generate` on a static batch of c
prompts, and `generate_batch`, transformers' own continuous batching. Prints a table and writes JSON.

    python benchmarks/against_transformers.py --output figures.json
"""

from __future__ import annotations

import argparse
import http.client
import json
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

CONCURRENCY = (1, 8, 32)
INPUT_TOKENS, OUTPUT_TOKENS = 128, 32


def prompt_ids(index: int) -> list[int]:
    """Prompts that share no prefix, so that no cache helps."""
    return [(index * 7919 + i * 104729) % 40_000 + 200 for i in range(INPUT_TOKENS)]


class Softbatch:
    """A server process with the defaults of `softbatch serve`."""

    def __init__(self, dtype: str, port: int) -> None:
        self.port = port
        self._directory = tempfile.TemporaryDirectory()
        command = [sys.executable, "-m", "server", "serve", "--port", str(port), "--dtype", dtype]
        command += ["--prompt-store", self._directory.name]
        self._log = Path(self._directory.name, "server.log").open("w+")  # noqa: SIM115
        self._process = subprocess.Popen(command, stderr=self._log)
        deadline = time.monotonic() + 300
        while True:
            try:
                if self._get("/health/ready")[0] == 200:
                    return
            except OSError:
                pass
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the server did not start: {Path(self._log.name).read_text()}")
            time.sleep(0.2)

    def run(self, concurrency: int, requests: int, offset: int) -> dict[str, float]:
        """Output tokens per second, and the mean duration of the steps meanwhile."""
        before = self._steps()
        counter = iter(range(offset, offset + requests))
        lock = threading.Lock()
        done = [0]

        def client() -> None:
            connection = http.client.HTTPConnection("127.0.0.1", self.port)
            while True:
                with lock:
                    index = next(counter, None)
                if index is None:
                    return
                body = {
                    "prompt": prompt_ids(index),
                    "max_tokens": OUTPUT_TOKENS,
                    "temperature": 0,
                    "ignore_eos": True,
                }
                connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
                reply = json.loads(connection.getresponse().read())
                with lock:
                    done[0] += reply["usage"]["completion_tokens"]

        started = time.perf_counter()
        with ThreadPoolExecutor(concurrency) as pool:
            for future in [pool.submit(client) for _ in range(concurrency)]:
                future.result()
        seconds = time.perf_counter() - started
        after = self._steps()
        return {
            "tokens_per_second": done[0] / seconds,
            "step_ms": 1000 * (after[0] - before[0]) / max(1.0, after[1] - before[1]),
        }

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(30)
        self._log.close()
        self._directory.cleanup()

    def _get(self, path: str) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read().decode()

    def _steps(self) -> tuple[float, float]:
        text = self._get("/metrics")[1]
        values = re.findall(r"^softbatch_step_duration_seconds_(sum|count) (\S+)$", text, re.M)
        found = {name: float(value) for name, value in values}
        return found["sum"], found["count"]


class Transformers:
    """The same weights in plain transformers, in this process."""

    def __init__(self, dtype: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        from scheduler.model.source import EMBEDDED_ALIAS, resolve

        self._torch = torch
        self._path = resolve(EMBEDDED_ALIAS).path
        self._model = AutoModelForCausalLM.from_pretrained(self._path, dtype=getattr(torch, dtype)).eval()
        self._dtype = dtype

    def generate(self, concurrency: int, requests: int, offset: int) -> dict[str, float]:
        """Static batches of `concurrency` prompts; the decode step is what each further token adds."""
        torch = self._torch
        options: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        produced, steps = 0, []
        started = time.perf_counter()
        for first in range(0, requests, concurrency):
            ids = torch.tensor([prompt_ids(offset + first + i) for i in range(concurrency)])
            mask = torch.ones_like(ids)
            since = time.perf_counter()
            with torch.inference_mode():
                output = self._model.generate(ids, attention_mask=mask, max_new_tokens=OUTPUT_TOKENS, **options)
            steps.append((time.perf_counter() - since) / OUTPUT_TOKENS)
            produced += concurrency * (output.shape[1] - INPUT_TOKENS)
        seconds = time.perf_counter() - started
        return {"tokens_per_second": produced / seconds, "step_ms": 1000 * statistics.mean(steps)}

    def generate_batch(self, concurrency: int, requests: int, offset: int) -> dict[str, float]:
        """transformers' continuous batching, with all requests of this round handed over at once."""
        from transformers import GenerationConfig

        config = GenerationConfig(max_new_tokens=OUTPUT_TOKENS, do_sample=False, eos_token_id=-1, pad_token_id=0)
        inputs = [prompt_ids(offset + i) for i in range(requests)]
        started = time.perf_counter()
        results = self._model.generate_batch(inputs=inputs, generation_config=config, progress_bar=False)
        seconds = time.perf_counter() - started
        produced = sum(len(result.generated_tokens) for result in results.values())
        return {"tokens_per_second": produced / seconds, "step_ms": float("nan")}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--port", type=int, default=8399)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--skip-generate-batch", action="store_true")
    options = parser.parse_args()

    results: dict[str, dict[int, list[dict[str, float]]]] = {}
    peer = Transformers(options.dtype)
    server = Softbatch(options.dtype, options.port)
    try:
        server.run(8, 16, 900_000)
        for round_number in range(options.rounds):
            for concurrency in CONCURRENCY:
                requests = 4 if concurrency == 1 else 2 * concurrency
                offset = round_number * 10_000 + concurrency * 100
                runs = {"softbatch": server.run, "transformers generate": peer.generate}
                if not options.skip_generate_batch:
                    runs["transformers generate_batch"] = peer.generate_batch
                for name, run in runs.items():
                    # generate_batch is handed all at once and takes long: one batch of it is enough.
                    figures = run(concurrency, concurrency if "batch" in name else requests, offset)
                    results.setdefault(name, {}).setdefault(concurrency, []).append(figures)
                    print(f"round {round_number} {name} c={concurrency}: {figures}", file=sys.stderr, flush=True)
    finally:
        server.stop()
    print_table(results)
    if options.output:
        described = {
            "machine": platform.processor() or platform.machine(),
            "date": time.strftime("%Y-%m-%d"),
            "dtype": options.dtype,
            "input_tokens": INPUT_TOKENS,
            "output_tokens": OUTPUT_TOKENS,
            "results": results,
        }
        options.output.write_text(json.dumps(described, indent=1))
    return 0


def print_table(results: dict[str, dict[int, list[dict[str, float]]]]) -> None:
    print(f"\n{INPUT_TOKENS} tokens in, {OUTPUT_TOKENS} out; median (least to most) of the rounds\n")
    print("| | " + " | ".join(f"concurrency {c}" for c in CONCURRENCY) + " |")
    print("|---|" + "---|" * len(CONCURRENCY))
    for name, by_concurrency in results.items():
        for figure, unit in (("tokens_per_second", "output tokens/s"), ("step_ms", "ms per step")):
            cells = []
            for concurrency in CONCURRENCY:
                values = sorted(run[figure] for run in by_concurrency[concurrency])
                if values[0] != values[0]:
                    break
                cells.append(f"{statistics.median(values):.1f} ({values[0]:.1f} to {values[-1]:.1f})")
            if cells:
                print(f"| {name}, {unit} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    sys.exit(main())
