"""The fidelity report: what the evaluation measured, as a JSON-able dict and as a page."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from softbatch.prompt_store.compression.data.accepted import is_right
from softbatch.prompt_store.compression.data.coverage import quarter
from softbatch.prompt_store.compression.data.examples import Example
from softbatch.prompt_store.compression.evaluation.evaluation import Evaluation, Measured
from softbatch.prompt_store.compression.evaluation.free_answers import (
    Answers,
    FreeAnswers,
    as_scores,
    right_answers,
)
from softbatch.prompt_store.compression.evaluation.page import render_page

SHOWN_ANSWERS = 12


def build_report(
    evaluation: Evaluation,
    sigma: Measured,
    baselines: dict[str, Measured],
    off_topic: dict[str, float],
    facts: dict[str, Any],
    free: FreeAnswers,
    answers: Mapping[str, Answers],
) -> dict[str, Any]:
    """report.json: σ's scores at the top level, the baselines' under `baselines`, what was answered `free`ly under
    `right_answers` and `answers`, then `facts` of the run."""
    no_context = baselines["no_context"].scores

    def shown(measured: Measured, name: str) -> dict[str, float | None]:
        scores = as_scores(measured.scores, answers.get(name), free)
        return scores.closed_against(no_context).as_dict()

    report: dict[str, Any] = dict(shown(sigma, "soft_prompt"))
    report |= facts
    report["baselines"] = {name: shown(measured, name) for name, measured in baselines.items()}
    report["right_answers"] = right_answers(free, answers)
    report["by_kind"] = _by(lambda example: example.kind, evaluation, sigma, baselines)
    report["by_place"] = _by(_quarter, evaluation, sigma, baselines)
    report["off_topic"] = off_topic
    count = len(free.examples)
    shown_answers = min(SHOWN_ANSWERS, count)
    report["answers"] = [_answer(free, answers, number * count // shown_answers) for number in range(shown_answers)]
    report["evaluation"] = {
        "questions": len(evaluation.pairs),
        "positions": sum(len(pair.answer) for pair in evaluation.pairs),
        "free_answers": count,
    }
    return report


def _answer(free: FreeAnswers, answers: Mapping[str, Answers], at: int) -> dict[str, Any]:
    """One question, side by side; `gold` is what would be right."""
    example = free.examples[at]
    found: dict[str, Any] = {"input": example.input, "gold": example.output or " / ".join(example.accept)}
    for name in ("full_context", "soft_prompt", "no_context", "recall", "retrieval_3x"):
        if name in answers:
            text = answers[name].texts[at]
            found[name] = text
            if example.accept:
                found.setdefault("right", {})[name] = is_right(text, example.accept)
    return found


def _by(
    group_of: Callable[[Example], str | None], evaluation: Evaluation, sigma: Measured, baselines: dict[str, Measured]
) -> dict[str, dict[str, float | None]]:
    """Per group of questions how many there are, σ's KL a token, and kl_closed; those of no group are left out."""
    members: dict[str, list[int]] = {}
    for index, example in enumerate(evaluation.examples):
        if (group := group_of(example)) is not None:
            members.setdefault(group, []).append(index)
    sizes = [len(pair.answer) for pair in evaluation.pairs]

    def mean(kl: Sequence[float], of: Sequence[int]) -> float:
        return sum(kl[index] * sizes[index] for index in of) / sum(sizes[index] for index in of)

    found: dict[str, dict[str, float | None]] = {}
    for group, of in sorted(members.items()):
        kl, bare = mean(sigma.kl, of), mean(baselines["no_context"].kl, of)
        found[group] = {
            "questions": len(of),
            "kl": round(kl, 6),
            "kl_closed": round(1 - kl / bare, 6) if bare > 0 else None,
        }
    return found


def _quarter(example: Example) -> str | None:
    """None where a question is about the whole, or does not say where: the user's need not."""
    if example.kind == "general" or (example.source == "user" and example.position == 0):
        return None
    return quarter(example.position)


def break_even(seconds: float, prefill_seconds: float) -> int | None:
    """After how many requests the compression has paid for itself, when each would else read the whole
    context."""
    return None if prefill_seconds <= 0 else max(1, -int(-seconds // prefill_seconds))


def thinned(curve: Sequence[tuple[int, float, float]], points: int = 200) -> list[list[float]]:
    """The training curve in at most `points` means of (step, seconds, loss)."""
    size = max(1, -(-len(curve) // points))
    rows = []
    for start in range(0, len(curve), size):
        part = curve[start : start + size]
        mean = torch.tensor([row[2] for row in part], dtype=torch.float64, device="cpu").mean().item()
        rows.append([part[-1][0], round(part[-1][1], 3), round(mean, 6)])
    return rows


def write_report(report: dict[str, Any], directory: Path, name: str = "") -> None:
    """report.json and report.html in `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "report.json").write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (directory / "report.html").write_text(render_page(report, name), encoding="utf-8")
