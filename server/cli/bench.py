"""`softbatch bench`: put load on any OpenAI-compatible server and say how it took it."""

from __future__ import annotations

import argparse
import json
import os
import sys
import urllib.parse
import urllib.request

from rich.console import Console
from rich.table import Table

from softbatch.server.bench.figures import Objective, Spread
from softbatch.server.bench.load import Plan
from softbatch.server.bench.measurement import Report, measure
from softbatch.server.bench.processes import listening_on
from softbatch.server.bench.workload import WORKLOADS, Requests, Workload
from softbatch.server.cli.settings_flags import UsageError
from softbatch.server.settings import LOOPBACK


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
