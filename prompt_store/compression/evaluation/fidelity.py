"""How faithful a prefix is to the full context: distributions at the gold answers' positions, and free
answers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from softbatch.prompt_store.compression.frozen.frozen_model import Decoder
from softbatch.prompt_store.compression.frozen.rendering import TrainingPair
from softbatch.prompt_store.compression.objectives import kl, nll

RANKED = 20
CHUNK = 256


@dataclass(frozen=True)
class FidelityScores:
    """Means over answer positions (`kl` … `nll`) and over questions (`exact_match`, `token_f1`).

    kl, kl_p95: KL(full context ‖ this) in nats, its mean and 95th percentile. kl_closed: 1 − kl / kl(no
    context). top1_agreement: the same most probable token. top5_overlap: the shared part of the two top
    fives. rank_correlation: Spearman's over the teacher's 20 most probable tokens. entropy_gap: H(this) −
    H(full context), negative when this is too sure of itself. nll: −log Pr of the gold answer, per token.
    exact_match, token_f1: free-running greedy answers against the gold ones; None when no free answers were
    asked for.
    """

    kl: float
    kl_p95: float
    top1_agreement: float
    top5_overlap: float
    rank_correlation: float
    entropy_gap: float
    nll: float
    kl_closed: float | None = None
    exact_match: float | None = None
    token_f1: float | None = None

    def as_dict(self) -> dict[str, float | None]:
        return {name: value if value is None else round(value, 6) for name, value in asdict(self).items()}

    def closed_against(self, no_context: FidelityScores) -> FidelityScores:
        """With kl_closed, which needs the KL of the model without the context (None if that is zero)."""
        closed = 1.0 - self.kl / no_context.kl if no_context.kl > 0 else None
        return replace(self, kl_closed=closed)


def position_scores(
    decoder: Decoder, states: Sequence[Tensor], teacher: Sequence[Tensor], pairs: Sequence[TrainingPair]
) -> FidelityScores:
    """Compare last hidden states pair by pair with the teacher's; exact over the vocabulary."""
    return scores_of(position_table(decoder, states, teacher, pairs))


def scores_of(table: Tensor) -> FidelityScores:
    """The means of a `position_table`."""
    means = table.mean(1).tolist()
    worst = float(table[0].quantile(0.95))
    return FidelityScores(means[0], worst, means[1], means[2], means[3], means[4], means[5])


@torch.inference_mode()
def position_table(
    decoder: Decoder, states: Sequence[Tensor], teacher: Sequence[Tensor], pairs: Sequence[TrainingPair]
) -> Tensor:
    """[6, answer positions]: KL, top-1 agreement, top-5 overlap, rank correlation, entropy gap, gold NLL."""
    columns: list[Tensor] = []
    found, expected = torch.cat(list(states)), torch.cat(list(teacher))
    gold = torch.tensor([token for pair in pairs for token in pair.answer], device=found.device)
    for start in range(0, len(gold), CHUNK):
        part = slice(start, start + CHUNK)
        student, reference = decoder.project_wide(found[part]), decoder.project_wide(expected[part])
        top_t, top_s = reference.topk(5).indices, student.topk(5).indices
        shared = (top_t[:, :, None] == top_s[:, None, :]).any(2).to(student.dtype).mean(1)
        columns.append(
            torch.stack(
                (
                    kl(reference, student),
                    (top_t[:, 0] == top_s[:, 0]).to(student.dtype),
                    shared,
                    _spearman(reference, student),
                    _entropy(student) - _entropy(reference),
                    nll(student, gold[part]),
                )
            )
        )
    return torch.cat(columns, dim=1)


def _entropy(logits: Tensor) -> Tensor:
    log = logits.log_softmax(-1)
    return -(log.exp() * log).sum(-1)


def _spearman(reference: Tensor, student: Tensor) -> Tensor:
    """Rank correlation of the student's order of the reference's most probable tokens, [positions]."""
    count = min(RANKED, reference.shape[-1])
    best = reference.topk(count).indices
    # Stable: equal logits keep the reference's order.
    order = student.gather(1, best).sort(stable=True, dim=-1, descending=True).indices
    ranks = order.argsort(-1).to(student.dtype)
    difference = (ranks - torch.arange(count, device=ranks.device)).square().sum(-1)
    correlation: Tensor = 1.0 - 6.0 * difference / (count * (count * count - 1))
    return correlation


def answer_scores(
    answers: Sequence[str], gold: Sequence[str], tokens: Callable[[str], Sequence[int]]
) -> tuple[float, float]:
    """(exact match, mean token F1) of free-running answers against the gold ones."""
    if not gold:
        return math.nan, math.nan
    exact = sum(a == g for a, g in zip(answers, gold, strict=True)) / len(gold)
    return exact, sum(token_f1(tokens(a), tokens(g)) for a, g in zip(answers, gold, strict=True)) / len(gold)


def token_f1(answer: Sequence[int], gold: Sequence[int]) -> float:
    """Harmonic mean of precision and recall of the answer's tokens as a bag; 1 when both are empty."""
    if not answer or not gold:
        return float(len(answer) == len(gold))
    shared = sum((Counter(answer) & Counter(gold)).values())
    return 2.0 * shared / (len(answer) + len(gold))
