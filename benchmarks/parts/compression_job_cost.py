"""What a compression job costs the requests served meanwhile: the same load without a job and beside one, by its phase.

    python -m benchmarks.parts.compression_job_cost

Closed loop: at concurrency c, c clients each send one streamed request after the other, 128 tokens in, 32 out. The
machine must have nothing else to do.
"""

from __future__ import annotations

import argparse
import http.client
import json
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from benchmarks.libraries.step_worker import prompts
from benchmarks.serving.benched_model import BenchedModel
from benchmarks.serving.servers import Server, softbatch

CONTEXT = Path(__file__).resolve().parents[2] / "examples" / "manual" / "context.md"
INPUT_TOKENS, OUTPUT_TOKENS = 128, 32
# Requests of a round, by concurrency.
LOAD = {1: 6, 8: 24}
JSON = {"Content-Type": "application/json"}


@dataclass(frozen=True)
class Round:
    """One round at one concurrency: its output tokens per second, and the seconds of each request to its first and to
    its last token."""

    rate: float
    first: list[float]
    last: list[float]


def streamed(port: int, index: int) -> tuple[float, float]:
    """Seconds from sending one request to its first token and to its end."""
    body = {
        "prompt": prompts(index, 1, INPUT_TOKENS)[0],
        "max_tokens": OUTPUT_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    began = time.perf_counter()
    connection.request("POST", "/v1/completions", json.dumps(body), JSON)
    reply = connection.getresponse()
    if reply.status != 200:
        raise RuntimeError(f"/v1/completions: {reply.status} {reply.read().decode()}")
    first = None
    while line := reply.readline():
        if first is None and line.startswith(b"data:"):
            first = time.perf_counter() - began
    connection.close()
    if first is None:
        raise RuntimeError("/v1/completions: the stream was empty")
    return first, time.perf_counter() - began


def run_round(port: int, concurrency: int, requests: int, offset: int) -> Round:
    began = time.perf_counter()
    with ThreadPoolExecutor(concurrency) as pool:
        done = list(pool.map(lambda index: streamed(port, index), range(offset, offset + requests)))
    rate = requests * OUTPUT_TOKENS / (time.perf_counter() - began)
    return Round(rate, [first for first, _ in done], [last for _, last in done])


def start_job(port: int, minutes: float) -> str:
    body = {"name": "cost", "context": CONTEXT.read_text(), "minutes": minutes}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", "/v1/compressions", json.dumps(body), JSON)
    reply = connection.getresponse()
    found = json.loads(reply.read())
    if reply.status >= 300:
        raise RuntimeError(f"/v1/compressions: {reply.status} {found}")
    return str(found["id"])


def job_phase(port: int, job: str) -> str | None:
    """What the job is at, None once it has succeeded. Raises RuntimeError when it ended otherwise."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", f"/v1/compressions/{job}")
    found: dict[str, Any] = json.loads(connection.getresponse().read())
    if found["status"] == "succeeded":
        return None
    if found["status"] not in ("queued", "running"):
        raise RuntimeError(f"the job ended as {found['status']}: {found.get('error')}")
    return str((found.get("progress") or {}).get("phase", "start"))


def percentiles(values: list[float]) -> str:
    """Median and 95th percentile in milliseconds."""
    cut = statistics.quantiles(values, n=20, method="inclusive")
    return f"{1000 * statistics.median(values):.0f} / {1000 * cut[18]:.0f}"


def print_table(rounds: dict[tuple[str, int], list[Round]]) -> None:
    print("| | concurrency | output tokens/s (least to most) | first token, ms: p50 / p95 | answer, ms | requests |")
    print("|---|---|---|---|---|---|")
    for (label, concurrency), done in rounds.items():
        rates = [one.rate for one in done]
        first, last = ([seconds for one in done for seconds in getattr(one, name)] for name in ("first", "last"))
        print(
            f"| {label} | {concurrency} | {statistics.median(rates):.0f} ({min(rates):.0f} to {max(rates):.0f}) | "
            f"{percentiles(first)} | {percentiles(last)} | {len(first)} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="without a job; beside it, as many as it lasts")
    parser.add_argument("--minutes", type=float, default=4.0, help="budget of the job")
    parser.add_argument("--at-most", type=float, default=10.0, help="minutes of load beside the job")
    parser.add_argument("--port", type=int, default=8398)
    options = parser.parse_args()
    store = tempfile.TemporaryDirectory()
    server = Server(softbatch(options.port, Path(store.name), BenchedModel.embedded()), options.port)
    rounds: dict[tuple[str, int], list[Round]] = {}
    offsets = count(0, 100)

    def measure(concurrency: int) -> Round:
        return run_round(options.port, concurrency, LOAD[concurrency], next(offsets))

    def keep(label: str, concurrency: int, done: Round) -> None:
        rounds.setdefault((label, concurrency), []).append(done)
        print(f"{label}, concurrency {concurrency}: {done.rate:.1f} tokens/s", file=sys.stderr, flush=True)

    try:
        server.start()
        run_round(options.port, 8, 16, 900_000)
        for _ in range(options.rounds):
            for concurrency in LOAD:
                keep("alone", concurrency, measure(concurrency))
        job = start_job(options.port, options.minutes)
        phase = job_phase(options.port, job)
        end = time.monotonic() + 60 * options.at_most
        while phase is not None and time.monotonic() < end:
            for concurrency in LOAD:
                done, before = measure(concurrency), phase
                phase = job_phase(options.port, job)
                if phase is None:
                    break
                keep("beside a job", concurrency, done)
                if phase == before:
                    keep(f"— at {phase}", concurrency, done)
    finally:
        server.stop()
        store.cleanup()
    print_table(dict(sorted(rounds.items(), key=lambda item: (item[0][0] != "alone", item[0][0] != "beside a job"))))


if __name__ == "__main__":
    main()
