"""What a compression's figures mean, in words."""

from __future__ import annotations

from typing import Any

FEW_STEPS = 50
GOOD, FAIR = 0.9, 0.75
# Of the distance to the full context: less than so much more than the untrained start is nothing learnt.
LEARNT = 0.05
# The part of the held-out loss that the last quarter of training took away, when more time would help.
FALLING = 0.1


def verdict_of(report: dict[str, Any], loss_before: float | None) -> str:
    """How faithful it is and, where questions say what is right, how often it is and what would do better."""
    return _fidelity(report, loss_before) + _rightness(report)


def _rightness(report: dict[str, Any]) -> str:
    rows = {name: row for name, row in (report.get("right_answers") or {}).items() if "right" in row}
    sigma = rows.get("soft_prompt")
    if sigma is None:
        return ""
    others = {name: f"{rows[name]['right']} {words}" for name, words in _OTHERS.items() if name in rows}
    said = f"; right answers: {sigma['right']} of {sigma['questions']}, " + ", ".join(others.values())
    retrieval = max((rows[name]["right"] for name in _RETRIEVAL if name in rows), default=0)
    recall = rows["recall"]["right"] if "recall" in rows else 0
    if max(retrieval, recall) <= sigma["right"]:
        return said
    if retrieval > max(recall, sigma["right"]):
        return f"{said}: for questions like these retrieval alone does better"
    return f"{said}: keep its text and use recall"


_OTHERS = {
    "recall": "with recall",
    "full_context": "with the full context",
    "retrieval": "by retrieval of as many tokens",
    "retrieval_3x": "of three times as many",
    "retrieval_recall": "of as many as with recall",
    "no_context": "without",
}
_RETRIEVAL = [name for name in _OTHERS if name.startswith("retrieval")]


def _fidelity(report: dict[str, Any], loss_before: float | None) -> str:
    """From a report's figures; `loss_before` is the held-out loss when three quarters of training were done. Where the
    report's training has no minutes, there was no budget."""
    closed = report["kl_closed"]
    steps = report["training"]["steps"]
    made = f"{steps:,} training step{'s' if steps != 1 else ''}"
    if closed is None:
        return f"unknown: the full context changes nothing about the answers; {made}"
    falls = loss_before is not None and loss_before > 0 and 1 - report["kl"] / loss_before > FALLING
    is_budgeted = report["training"].get("minutes") is not None
    unit = "minutes" if is_budgeted else "steps"
    more = f"; the held-out loss was still falling, more {unit} help" if falls else ""
    reached = f"{closed:.2f} of the way from no context to the full one ({made})"
    start = report["baselines"]["untrained"]["kl_closed"]
    if steps < FEW_STEPS and is_budgeted and closed < GOOD:
        return f"too short: {made}, {closed:.2f} of the way from no context to the full one; give it more --minutes"
    if closed < LEARNT or (start is not None and closed < FAIR and closed - start < LEARNT):
        return f"learned nothing: {reached}, no better than without training; do not use it"
    if closed >= GOOD:
        return f"good: {reached}{more}"
    if closed >= FAIR:
        return f"fair: {reached}{more or f'; more virtual tokens or {unit} may help'}"
    return f"weak: {reached}{more or '; give it more virtual tokens, or use the full context'}"
