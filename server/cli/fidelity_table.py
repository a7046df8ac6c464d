"""A fidelity report as a table for the terminal."""

from __future__ import annotations

from typing import Any

from rich.table import Table

_ROWS = {
    "no_context": "no context",
    "truncated": "truncated",
    "untrained": "untrained",
    "wrong_prompt": "another prompt",
    "full_context": "full context",
}
_COLUMNS = {"kl_closed": "KL closed", "top1_agreement": "top-1", "kl": "KL", "nll": "gold NLL", "token_f1": "F1"}


def fidelity_table(report: dict[str, Any]) -> Table:
    """The soft prompt first, then what it is compared with."""
    table = Table(title="fidelity on held-out questions", title_justify="left")
    table.add_column("")
    for heading in _COLUMNS.values():
        table.add_column(heading, justify="right")
    table.add_row("soft prompt", *_figures(report), style="bold")
    for name, title in _ROWS.items():
        if name in report["baselines"]:
            table.add_row(title, *_figures(report["baselines"][name]))
    return table


def _figures(scores: dict[str, Any]) -> list[str]:
    return ["-" if (value := scores.get(name)) is None else f"{value:.3f}" for name in _COLUMNS]
