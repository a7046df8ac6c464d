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


_ANSWERS = {
    "soft_prompt": "soft prompt",
    "recall": "with recall",
    "full_context": "full context",
    "retrieval": "retrieval",
    "retrieval_3x": "retrieval, 3 times",
    "retrieval_recall": "retrieval, as recall",
    "truncated": "truncated",
    "no_context": "no context",
}


def right_answers_table(report: dict[str, Any]) -> Table | None:
    """None where no question says what is right."""
    rows = report.get("right_answers") or {}
    if not any("right" in row for row in rows.values()):
        return None
    table = Table(title="right answers", title_justify="left")
    for heading in ("", "right", "95 % interval", "prompt tokens", "first token"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, title in _ANSWERS.items():
        if (row := rows.get(name)) is not None:
            first = row["first_token_seconds"]
            table.add_row(
                title,
                f"{row['right']} of {row['questions']}",
                f"{row['low']:.0%} to {row['high']:.0%}",
                f"{row['prompt_tokens']:.0f}",
                "-" if first is None else f"{1e3 * first:.0f} ms",
                style="bold" if name == "soft_prompt" else None,
            )
    return table


def _figures(scores: dict[str, Any]) -> list[str]:
    return ["-" if (value := scores.get(name)) is None else f"{value:.3f}" for name in _COLUMNS]
