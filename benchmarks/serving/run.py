"""softbatch beside vLLM and llama.cpp: the same weights, the same prompts, through HTTP, interleaved, in one run.

Every server is started once, and suspended while another is measured. Each cell is a closed loop in a steady state:
a ramp until every client has had its first token, then a window of fixed length. Writes a table, JSON and a plot.

    make bench                         everything, three rounds, about half an hour
    make bench ARGS=--quick            one short round
    make bench ARGS="--servers softbatch,vllm --workloads hot,many"
    make bench ARGS="--servers softbatch --before ../main"      beside another checkout of softbatch
    make bench ARGS="--servers softbatch,softbatch-traced,softbatch-watched --workloads short"   what looking on costs
    make bench ARGS="--model FILE.gguf --workloads plain --servers softbatch,softbatch-native,llama.cpp-file,vllm"
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.flags import names_of
from benchmarks.machine import machine
from benchmarks.serving.benched_model import BenchedModel
from benchmarks.serving.peers import BENCH, Unavailable
from benchmarks.serving.plot import draw
from benchmarks.serving.servers import (
    Launch,
    Server,
    llama,
    softbatch,
    softbatch_before,
    softbatch_traced,
    softbatch_watched,
    vllm,
)
from benchmarks.serving.soft_prompts import register
from benchmarks.serving.tables import BEFORE, Run, describe
from softbatch.server.bench.figures import Objective
from softbatch.server.bench.load import Plan
from softbatch.server.bench.measurement import measure
from softbatch.server.bench.workload import WORKLOADS, Requests

SERVERS = (
    "softbatch",
    "vllm",
    "llama.cpp-BF16",
    "softbatch-int8",
    "llama.cpp-Q8_0",
    "softbatch-kv-int8",
    "softbatch-kv-k6v4",
)
# Only where they are asked for: one that sends traces, one whose console is open, and a GGUF file's own weights.
ASKED_FOR = ("softbatch-traced", "softbatch-watched", "softbatch-native", "llama.cpp-file")
CONCURRENCY = {"plain": (1, 8, 32, 64), "short": (1, 8, 32, 64), "hot": (8, 32), "many": (8, 32)}
# Seconds of a window. A peer computes 1,500 tokens for each request of *many*, so few end in a short one.
WINDOWS = {"plain": 10.0, "short": 6.0, "hot": 8.0, "many": 10.0}
SLOW_WINDOWS = {"many": 25.0}
MAX_RAMP = 30.0
SETTLE_SECONDS = 1.5


@dataclass(frozen=True)
class Cell:
    """One measurement of the plan."""

    round: int
    workload: str
    concurrency: int
    server: str

    def window(self, quick: bool) -> float:
        seconds = WINDOWS[self.workload]
        if not self.server.startswith("softbatch"):
            seconds = SLOW_WINDOWS.get(self.workload, seconds)
        return seconds / 2 if quick else seconds

    def seconds(self, quick: bool) -> float:
        """A guess for the time left: the ramp computes one prompt for each client."""
        work = WORKLOADS[self.workload]
        tokens = work.input_tokens + (0 if self.server.startswith("softbatch") else work.context_tokens)
        return self.window(quick) + min(MAX_RAMP, self.concurrency * tokens / 1400) + SETTLE_SECONDS


def plan_of(options: argparse.Namespace, servers: Sequence[str]) -> list[Cell]:
    """Servers take turns within each cell of the table, so that a machine's slow minute meets them all. Every other
    round has them in the opposite order."""
    return [
        Cell(number, workload, concurrency, server)
        for number in range(options.rounds)
        for workload in options.workloads
        for concurrency in CONCURRENCY[workload]
        if not options.concurrency or concurrency in options.concurrency
        for server in (servers if number % 2 == 0 else servers[::-1])
        if _is_asked(workload, server)
    ]


def _is_asked(workload: str, server: str) -> bool:
    """Contexts are for softbatch and vLLM: they are about KV memory and prefix caching, not about the weights' format.
    A packed KV cache is for *hot*, where its memory is watched."""
    if server.startswith("softbatch-kv"):
        return workload == "hot"
    return workload in ("plain", "short") or server in ("softbatch", BEFORE, "vllm")


def launches(options: argparse.Namespace) -> Iterator[tuple[str, Launch | Unavailable]]:
    store = BENCH / ("prompts" if options.model.is_embedded else "no-prompts")
    model = options.model
    makers = {
        "softbatch": lambda port: softbatch(port, store, model),
        "softbatch-traced": lambda port: softbatch_traced(port, store, model),
        "softbatch-watched": lambda port: softbatch_watched(port, store, model),
        "vllm": lambda port: vllm(port, model),
        "llama.cpp-BF16": lambda port: llama(port, model, "BF16"),
        "softbatch-int8": lambda port: softbatch(port, store, model, "int8"),
        "llama.cpp-Q8_0": lambda port: llama(port, model, "Q8_0"),
        "softbatch-native": lambda port: softbatch(port, store, model, "native"),
        "llama.cpp-file": lambda port: llama(port, model),
        "softbatch-kv-int8": lambda port: softbatch(port, store, model, kv_cache_dtype="int8"),
        "softbatch-kv-k6v4": lambda port: softbatch(port, store, model, kv_cache_dtype="k6v4"),
    }
    if options.before:
        makers[BEFORE] = lambda port: softbatch_before(options.before, port, store, model)
    for number, name in enumerate([*options.servers, *([BEFORE] if options.before else [])]):
        try:
            yield name, makers[name](options.port + number)
        except Unavailable as error:
            yield name, error


def start_all(options: argparse.Namespace) -> dict[str, Server]:
    """Install, start twice (the first start may build and compile) and suspend each server that can be had."""
    servers: dict[str, Server] = {}
    try:
        for number, (name, launch) in enumerate(launches(options)):
            try:
                if isinstance(launch, Unavailable):
                    raise launch
                server = Server(launch, options.port + number)
                servers[name] = server
                if server.is_first_start:
                    say(f"{name}: first start …")
                    server.start()
                    server.stop()
                say(f"{name}: starting …")
                server.start()
                say(f"{name}: ready after {server.ready_seconds:.1f} s")
                server.settle()
                server.suspend()
            except Unavailable as error:
                servers.pop(name, None)
                say(f"{name}: skipped: {error}")
    except BaseException:
        stop_all(servers)
        raise
    return servers


def stop_all(servers: dict[str, Server]) -> None:
    for server in servers.values():
        server.stop()


def measure_cell(server: Server, cell: Cell, quick: bool) -> Run:
    work = WORKLOADS[cell.workload]
    soft_prompt = "context-{index}" if server.launch.soft_prompts and work.contexts else None
    # The round is part of the seed: no prefix cache knows a prompt, except the contexts, which are the same each time.
    seed = 100 * cell.round + cell.concurrency
    requests = Requests(work, server.launch.model.name, seed, server.launch.model.vocab_size, soft_prompt)
    watch = KvWatch(server, work.contexts) if cell.workload == "hot" else None
    server.resume()
    try:
        if watch is not None:
            watch.start()
        plan = Plan(cell.concurrency, duration=cell.window(quick), max_ramp=MAX_RAMP)
        report = measure(server.url, requests, plan, Objective(), pid=server.pid)
        if watch is not None:
            watch.stop()
        server.settle()
    finally:
        server.suspend()
    kv = watch.median if watch is not None else None
    return Run(cell.round, cell.workload, cell.concurrency, cell.server, report.as_json(), kv)


class KvWatch(threading.Thread):
    """Reads a server's KV use every other second while it runs."""

    def __init__(self, server: Server, contexts: int) -> None:
        super().__init__(daemon=True)
        self._server = server
        self._contexts = contexts
        self._ended = threading.Event()
        self._seen: list[float] = []

    def run(self) -> None:
        while not self._ended.wait(2.0):
            held = self._server.kv_bytes_per_request(self._contexts)
            if held:
                self._seen.append(held)

    def stop(self) -> None:
        self._ended.set()
        self.join()

    @property
    def median(self) -> float | None:
        return sorted(self._seen)[len(self._seen) // 2] if self._seen else None


def run_all(options: argparse.Namespace, servers: dict[str, Server], save: Any) -> list[Run]:
    cells = plan_of(options, list(servers))
    left = sum(cell.seconds(options.quick) for cell in cells)
    say(f"{len(cells)} measurements, about {left / 60:.0f} minutes")
    runs: list[Run] = []
    pace, spent, expected = 1.0, 0.0, 0.0
    for number, cell in enumerate(cells, 1):
        started = time.monotonic()
        run = measure_cell(servers[cell.server], cell, options.quick)
        runs.append(run)
        spent += time.monotonic() - started
        expected += cell.seconds(options.quick)
        pace = spent / expected
        rest = pace * sum(c.seconds(options.quick) for c in cells[number:])
        wrong = run.figures["failed"] + run.figures["wrong_length"]
        trouble = f", {wrong} WRONG: {run.figures['errors']}" if wrong else ""
        if (share := run.others_share) > 0.05:
            trouble += f", {100 * share:.0f} % of a core went elsewhere"
        say(
            f"[{number}/{len(cells)}, {rest / 60:.1f} min left] round {cell.round + 1} {cell.workload} "
            f"at {cell.concurrency}: {cell.server} {run.figures['output_tokens_per_second']:.1f} tokens/s, "
            f"{run.figures['requests_per_second']:.2f} requests/s{trouble}"
        )
        save(runs)
    return runs


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round with windows half as long")
    parser.add_argument("--rounds", type=int, help="default: 3")
    parser.add_argument("--servers", type=names_of((*SERVERS, *ASKED_FOR)), default=list(SERVERS))
    parser.add_argument(
        "--model",
        type=BenchedModel.of_file,
        metavar="FILE",
        help="a GGUF file; default: the embedded model",
    )
    parser.add_argument("--before", type=Path, metavar="DIR", help="another checkout of softbatch, measured in turn")
    parser.add_argument("--workloads", type=names_of(CONCURRENCY), default=list(CONCURRENCY))
    parser.add_argument("--concurrency", type=lambda text: [int(part) for part in text.split(",")])
    parser.add_argument("--port", type=int, default=8390, help="the first of a few ports")
    parser.add_argument("--output", type=Path, default=BENCH / "results", help="folder for table, JSON and plot")
    options = parser.parse_args()
    # Servers are in sessions of their own: whatever ends this, they must be stopped on the way out.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    contexts = {"hot", "many"} & set(options.workloads)
    if contexts and options.model:
        parser.error("--model: there are no soft prompts for this model; choose --workloads plain,short")
    options.model = options.model or BenchedModel.embedded()
    options.rounds = options.rounds or (1 if options.quick else 3)
    options.output.mkdir(parents=True, exist_ok=True)
    started = time.time()
    if contexts:
        work = WORKLOADS["many"]
        register(BENCH / "prompts", work.contexts, work.context_tokens, options.model.vocab_size)
    servers = start_all(options)
    ready = {name: server.ready_seconds for name, server in servers.items()}
    head = {
        "date": time.strftime("%Y-%m-%d %H:%M", time.localtime(started)),
        "machine": machine(),
        "command": " ".join(["make bench", *(['ARGS="' + " ".join(sys.argv[1:]) + '"'] if sys.argv[1:] else [])]),
        "rounds": options.rounds,
        "quick": options.quick,
        "ready_seconds": ready,
        "commands": {name: list(server.launch.command) for name, server in servers.items()},
    }

    def save(runs: Sequence[Run]) -> None:
        content = {**head, "runs": [run.as_json() for run in runs]}
        (options.output / "bench.json").write_text(json.dumps(content, indent=1) + "\n")

    try:
        runs = run_all(options, servers, save)
    finally:
        stop_all(servers)
    table = describe(head, runs)
    (options.output / "bench.md").write_text(table)
    draw(runs, options.output / "bench.svg")
    print(table)
    say(f"took {(time.time() - started) / 60:.1f} minutes; written to {options.output}")
    return 1 if any(run.figures["failed"] or run.figures["wrong_length"] for run in runs) else 0


if __name__ == "__main__":
    sys.exit(main())
