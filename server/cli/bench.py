"""`softbatch bench`: put load on any OpenAI-compatible server and say how it took it."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from softbatch.server.bench.figures import Objective, Spread
from softbatch.server.bench.load import Plan
from softbatch.server.bench.measurement import Report, measure
from softbatch.server.bench.processes import listening_on
from softbatch.server.bench.workload import WORKLOADS, Requests, Workload
from softbatch.server.cli.settings_flags import UsageError
from softbatch.server.settings import LOOPBACK

_WORKLOADS = "; ".join(
    f"{w.name}: {w.input_tokens} tokens in, {w.output_tokens} out"
    + (f", behind one of {w.contexts} contexts of {w.context_tokens} tokens" if w.contexts else "")
    for w in WORKLOADS.values()
)


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "bench",
        help="put load on a server and measure it",
        description="A closed loop of clients, or Poisson arrivals, against POST /v1/completions of any "
        "OpenAI-compatible server; prompts are random token ids, outputs have a fixed length. The server's processor "
        "time and memory are measured too when it runs on this machine.",
    )
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the server (default: %(default)s)")
    parser.add_argument("--model", metavar="NAME", help="default: the first that the server lists")
    parser.add_argument("--api-key", metavar="KEY", help="sent as a bearer token [SOFTBATCH_API_KEY]")
    work = parser.add_argument_group("what is asked")
    work.add_argument("--workload", choices=sorted(WORKLOADS), default="short", help=_WORKLOADS)
    work.add_argument("--input-tokens", type=_count, metavar="N", help="instead of the workload's")
    work.add_argument("--output-tokens", type=_count, metavar="N", help="instead of the workload's")
    work.add_argument("--contexts", type=_count, metavar="N", help="instead of the workload's")
    work.add_argument(
        "--soft-prompt",
        metavar="NAME",
        help="send the soft prompt of this name instead of the context; {index} is the context's number",
    )
    work.add_argument("--vocab-size", type=_vocabulary, default=32_000, metavar="N", help="tokens to draw from")
    work.add_argument("--seed", type=int, default=0, help="another seed, other prompts (default: %(default)s)")
    load = parser.add_argument_group("how much")
    load.add_argument("--concurrency", type=_count, default=8, metavar="N", help="clients of the closed loop")
    load.add_argument("--rate", type=_positive, metavar="R", help="Poisson arrivals, R a second, instead of clients")
    load.add_argument("--requests", type=_count, metavar="N", help="send so many (default: 8 for each client)")
    load.add_argument("--duration", type=_positive, metavar="SECONDS", help="measure a window of a steady load")
    goal = parser.add_argument_group("objective: which requests count as good")
    goal.add_argument("--slo-first-token", type=_positive, default=2.0, metavar="SECONDS", help="(default: 2)")
    goal.add_argument("--slo-per-token", type=_positive, default=0.2, metavar="SECONDS", help="(default: 0.2)")
    parser.add_argument("--pid", type=_count, help="the server's process; default: who listens on the port")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    try:
        report = _measure(options)
        if options.json is not None:
            options.json.write_text(json.dumps(report.as_json(), indent=1) + "\n")
    except (UsageError, ValueError) as error:
        return _fail(str(error))
    except OSError as error:
        return _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    print_report(report)
    return 0 if report.figures.finished and not report.figures.failed else 1


def _fail(message: str) -> int:
    print(f"softbatch bench: {message}", file=sys.stderr)
    return 2


def _measure(options: argparse.Namespace) -> Report:
    key = options.api_key or os.environ.get("SOFTBATCH_API_KEY")
    host, port = _address(options.url)
    pid = options.pid if options.pid is not None else listening_on(port) if host in LOOPBACK else None
    requests = Requests(
        _workload(options),
        options.model or _served_model(options.url, key),
        options.seed,
        options.vocab_size,
        options.soft_prompt,
    )
    per_client = None if options.duration else 8 * options.concurrency
    plan = Plan(options.concurrency, options.rate, options.requests or per_client, options.duration)
    objective = Objective(options.slo_first_token, options.slo_per_token)
    return measure(options.url, requests, plan, objective, api_key=key, pid=pid)


def _workload(options: argparse.Namespace) -> Workload:
    named = WORKLOADS[options.workload]
    contexts = named.contexts if options.contexts is None else options.contexts
    if options.soft_prompt and not contexts:
        raise UsageError(f"--soft-prompt: workload {named.name} has no contexts; use hot or many, or --contexts")
    return Workload(
        named.name,
        options.input_tokens or named.input_tokens,
        options.output_tokens or named.output_tokens,
        contexts,
        named.context_tokens or 1500,
    )


def _address(url: str) -> tuple[str, int]:
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UsageError(f"--url {url}: give an address such as http://127.0.0.1:8000")
    return parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)


def _served_model(url: str, key: str | None) -> str:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        with urllib.request.urlopen(urllib.request.Request(f"{url.rstrip('/')}/v1/models", headers=headers)) as reply:
            return str(json.load(reply)["data"][0]["id"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UsageError(f"--url {url}: it does not say which models it serves ({error}); give --model") from error


def print_report(report: Report) -> None:
    """A table for people."""
    figures, plan, work = report.figures, report.plan, report.requests.workload
    load = f"{plan.rate:g} requests/s, Poisson" if plan.rate else f"{plan.concurrency} at once"
    table = Table(title=f"{work.name}, {work.input_tokens} tokens in, {work.output_tokens} out, {load}")
    for heading in ("", "p50", "p99", "mean"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, spread in (
        ("time to first token, ms", figures.first_token_ms),
        ("time per output token, ms", figures.per_token_ms),
        ("whole request, ms", figures.whole_ms),
    ):
        table.add_row(name, *_cells(spread))
    console = Console()
    console.print(table)
    goal = f"first token ≤ {figures.objective.first_token:g} s, then ≤ {figures.objective.per_token:g} s per token"
    lines = [
        f"{figures.output_tokens_per_second:.1f} output tokens/s, {figures.requests_per_second:.2f} requests/s "
        f"over {figures.seconds:.1f} s",
        f"{figures.goodput:.2f} good requests/s ({goal})",
        f"{figures.finished} finished, {figures.failed} failed, {figures.cut_off} cut off at the end, "
        f"{figures.wrong_length} of another length than asked",
        f"the client itself used {report.client_cpu_seconds:.2f} s of processor time in {report.seconds:.1f} s",
    ]
    if report.server is not None:
        peak = report.server.peak_rss_bytes / 2**20
        lines.append(f"the server used {report.server.cpu_seconds:.2f} s and at most {peak:.0f} MiB")
        lines.append(f"everything else on this machine used {report.server.others_cpu_seconds:.2f} s")
    lines += [f"{count} × {message[:300]}" for message, count in figures.errors.items()]
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _cells(spread: Spread | None) -> tuple[str, ...]:
    values = (spread.p50, spread.p99, spread.mean) if spread is not None else (None,) * 3
    return tuple("-" if value is None else f"{value:.1f}" for value in values)


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def _vocabulary(text: str) -> int:
    if _count(text) < 2:
        raise argparse.ArgumentTypeError("a vocabulary has at least 2 tokens")
    return int(text)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return value
