"""`softbatch top`: the running batch and the waiting queue of a server, live in the terminal."""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from softbatch.server.cli.server_client import ServerClient
from softbatch.server.cli.settings_flags import UsageError, settings_from

MAX_WAITING_SHOWN = 10
BAR = 20


@dataclass(frozen=True)
class Look:
    """What the server said at one moment; `figures` are the metrics without labels."""

    at: float
    queue: dict[str, Any]
    figures: dict[str, float]

    def per_second(self, before: Look | None, name: str) -> float | None:
        """How fast a counter grows; None for the first look, and when the server was started again meanwhile."""
        if before is None or self.at <= before.at:
            return None
        grown = self.figures.get(name, 0.0) - before.figures.get(name, 0.0)
        return grown / (self.at - before.at) if grown >= 0 else None

    def mean(self, before: Look | None, name: str) -> float | None:
        """Of what a histogram took in since `before`."""
        count, total = (self.figures.get(name + end, 0.0) for end in ("_count", "_sum"))
        if before is not None:
            count -= before.figures.get(name + "_count", 0.0)
            total -= before.figures.get(name + "_sum", 0.0)
        return total / count if count > 0 else None


def run(options: argparse.Namespace) -> int:
    try:
        client = ServerClient(options.server, next(iter(settings_from(options).api_key), None))
        model = str(client.call("GET", "/info")[1].get("model_id"))
        look = _look(client)
        console = Console()
        if options.once:
            console.print(_page(model, look, None))
            return 0
        before = None
        with Live(_page(model, look, before), console=console, screen=console.is_terminal, auto_refresh=False) as live:
            while True:
                time.sleep(options.interval)
                before, look = look, _look(client)
                live.update(_page(model, look, before), refresh=True)
    except UsageError as error:
        print(f"softbatch top: {error}", file=sys.stderr)
        return 2


def _look(client: ServerClient) -> Look:
    from prometheus_client.parser import text_string_to_metric_families

    queue = client.call("GET", "/v1/queue")[1]
    families = text_string_to_metric_families(client.text("/metrics"))
    figures = {sample.name: sample.value for family in families for sample in family.samples if not sample.labels}
    return Look(time.monotonic(), queue, figures)


def _page(model: str, look: Look, before: Look | None) -> Group:
    return Group(_figures(model, look, before), Text(), _requests(look))


def _figures(model: str, look: Look, before: Look | None) -> Table:
    queue, figures = look.queue, look.figures
    running = len(queue["running"]) + queue["others_running"]
    waiting = len(queue["waiting"]) + queue["others_waiting"]
    table = Table.grid(padding=(0, 3))
    table.add_row(
        f"[bold]{model}[/bold]",
        f"running {running} of {queue['slots']} {_bar(running / max(queue['slots'], 1))}",
        f"waiting {waiting}",
        f"KV cache {_bar(figures.get('softbatch_kv_usage_ratio', 0.0))}",
    )
    table.add_row(
        _rate("tokens/s", look.per_second(before, "softbatch_generation_tokens_total")),
        _seconds("first token", look.mean(before, "softbatch_time_to_first_token_seconds")),
        _seconds("between tokens", look.mean(before, "softbatch_inter_token_latency_seconds")),
        f"preempted {figures.get('softbatch_preemptions_total', 0):.0f}",
    )
    return table


def _requests(look: Look) -> Table:
    table = Table(box=None, header_style="dim", pad_edge=False)
    for column in ("request", "state", "age", "priority", "soft prompt", "prompt", "written"):
        table.add_column(column, justify="right" if column in ("age", "priority", "prompt") else "left")
    queue = look.queue
    for entry in [*queue["running"], *queue["waiting"][:MAX_WAITING_SHOWN]]:
        progress = entry["progress"]
        written = f"{_bar(progress['generated'] / max(progress['max_tokens'], 1))} {progress['generated']}"
        table.add_row(
            Text(entry["id"]),
            entry["state"],
            f"{entry['age_seconds']:.1f} s",
            str(entry["priority"]),
            Text(entry["soft_prompt"] or "-"),
            str(entry["prompt_tokens"]),
            f"{written} of {progress['max_tokens']}",
        )
    if (more := len(queue["waiting"]) - MAX_WAITING_SHOWN) > 0:
        table.add_row(f"and {more} more", "waiting", *[""] * 5)
    return table


def _bar(share: float) -> str:
    filled = round(min(max(share, 0.0), 1.0) * BAR)
    return "━" * filled + "[dim]" + "─" * (BAR - filled) + "[/dim]"


def _rate(name: str, value: float | None) -> str:
    return f"{name} {'-' if value is None else f'{value:.0f}'}"


def _seconds(name: str, value: float | None) -> str:
    return f"{name} {'-' if value is None else f'{1000 * value:.0f} ms'}"
