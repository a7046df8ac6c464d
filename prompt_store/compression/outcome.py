"""What a run gives: the trained soft prompt, and before that its preview."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from softbatch.prompt_store.compression.compression_settings import CompressionSettings
from softbatch.prompt_store.compression.evaluation.evaluation import Candidate, Evaluation
from softbatch.prompt_store.compression.frozen.context import Context
from softbatch.prompt_store.compression.training.student import Student


@dataclass(frozen=True)
class Outcome:
    """σ's tensors in float32 as a soft prompt file holds them, the report, and what the manifest wants to know."""

    kind: str
    tensors: dict[str, Tensor]
    report: dict[str, Any]
    context_sha256: str
    context_tokens: int


def preview_of(student: Student, context: Context, settings: CompressionSettings, evaluation: Evaluation) -> Outcome:
    """σ before training, with what can be measured of it in a moment."""
    sigma, nothing = (
        evaluation.measure(Candidate.shared(prefix, len(context.full))).scores
        for prefix in (student.fixed_prefix(), evaluation.no_context)
    )
    scores = sigma.closed_against(nothing)
    report: dict[str, Any] = {name: value for name, value in scores.as_dict().items() if value is not None}
    report["verdict"] = "preview: not trained"
    if scores.kl_closed is not None:
        report["verdict"] += f", {scores.kl_closed:.2f} of the way from no context to the full one"
    minutes = None if settings.seconds is None else settings.minutes
    report["training"] = {**asdict(settings), "minutes": minutes, "steps": None}
    tensors = {name: tensor.cpu() for name, tensor in student.tensors().items()}
    return Outcome(settings.kind, tensors, report, context.tokenized.sha256, context.num_tokens)
