"""What σ is trained for. All three are over the answer positions of a batch, exact over the whole vocabulary.

With t = Pr(·|c, z, y<i) the teacher's and s = Pr(·|σ, z, y<i) the student's distribution at position i:

    nll    −log s(ŷ_i)
    kl     KL(t ‖ s) = Σ_v t(v) · (log t(v) − log s(v))
    mixed  α · nll + (1 − α) · kl

Their gradient in the student's logits is s − q, where q = α · [v = ŷ_i] + (1 − α) · t: one formula for the
three.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def nll(student_logits: Tensor, gold: Tensor) -> Tensor:
    """−log Pr(ŷ | σ, z) at each position; logits [positions, vocab], gold ids [positions]."""
    return F.cross_entropy(student_logits, gold, reduction="none")


def kl(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    """KL(Pr(·|c, z) ‖ Pr(·|σ, z)) at each position; both logits [positions, vocab]."""
    teacher = teacher_logits.log_softmax(-1)
    return (teacher.exp() * (teacher - student_logits.log_softmax(-1))).sum(-1)


def mixed(teacher_logits: Tensor, student_logits: Tensor, gold: Tensor, alpha: float) -> Tensor:
    """α · nll + (1 − α) · kl at each position."""
    return alpha * nll(student_logits, gold) + (1 - alpha) * kl(teacher_logits, student_logits)


class _FromHidden(torch.autograd.Function):
    """The mean of `mixed` from last hidden states; logits live only for `chunk` positions at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor | None,
        gold: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        alpha: float,
        chunk: int,
    ) -> Tensor:
        count = student.shape[0]
        total = torch.zeros((), dtype=torch.promote_types(student.dtype, torch.float32), device=student.device)
        gradient = torch.empty_like(student)
        for start in range(0, count, chunk):
            part = slice(start, start + chunk)
            log_s = F.log_softmax(F.linear(student[part], weight, bias), -1, dtype=total.dtype)
            labels = gold[part, None]
            total -= alpha * log_s.gather(1, labels).sum()
            if teacher is not None and alpha < 1:
                log_t = F.linear(teacher[part].to(weight.dtype), weight, bias)
                log_t = F.log_softmax(log_t, -1, dtype=total.dtype)
                t = log_t.exp()
                # A pass over [chunk, vocab] costs as much as a tenth of the projection: few, and in place.
                total += (1 - alpha) * torch.dot(log_t.sub_(log_s).view(-1), t.view(-1))
                residual = log_s.exp_().sub_(t, alpha=1 - alpha)
            else:
                residual = log_s.exp_()
            if alpha > 0:
                residual.scatter_add_(1, labels, torch.full_like(labels, -alpha, dtype=residual.dtype))
            gradient[part] = residual.to(weight.dtype) @ weight
        ctx.save_for_backward(gradient.div_(count))
        return total / count

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * outer[0].to(gradient.dtype), None, None, None, None, None, None


def objective_from_hidden(
    student: Tensor,
    teacher: Tensor | None,
    gold: Tensor,
    head: torch.nn.Module,
    alpha: float,
    chunk: int = 128,
) -> Tensor:
    """The mean over positions of `mixed`, from last hidden states [positions, hidden] and the shared lm_head.

    Equal to projecting both and calling `mixed`, without keeping [positions, vocab] tensors for the backward
    pass: a teacher's [positions, hidden] is its whole distribution. `teacher` may be None when alpha is 1.
    """
    if teacher is None and alpha < 1:
        raise ValueError("kl and mixed need the teacher's hidden states")
    loss = _FromHidden.apply(  # type: ignore[no-untyped-call]
        student, teacher, gold, head.weight, getattr(head, "bias", None), alpha, chunk
    )
    assert isinstance(loss, Tensor)
    return loss
