"""The three objectives: closed forms, gradients against finite differences, and the memory-lean version."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from softbatch.prompt_store.compression.compression_settings import weight_of_nll
from softbatch.prompt_store.compression.objectives import kl, mixed, nll, objective_from_hidden


def logits(seed: int, positions: int = 5, vocab: int = 11) -> torch.Tensor:
    return torch.randn(positions, vocab, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3


def test_kl_is_zero_for_equal_distributions() -> None:
    teacher = logits(0)
    assert kl(teacher, teacher + 4.2).abs().max() < 1e-12


def test_kl_against_hand_computed_value() -> None:
    teacher = torch.tensor([[0.6, 0.3, 0.1]], dtype=torch.float64).log()
    student = torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64).log()
    expected = 0.6 * 0.1823215567939546 + 0.3 * 0.1823215567939546 + 0.1 * -0.916290731874155
    assert kl(teacher, student).item() == pytest.approx(expected, abs=1e-12)


@given(st.integers(0, 10_000), st.floats(0, 1))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_mixed_lies_between_its_parts(seed: int, alpha: float) -> None:
    teacher, student = logits(seed), logits(seed + 1)
    gold = torch.arange(5)
    assert kl(teacher, student).min() >= -1e-12
    whole = mixed(teacher, student, gold, alpha)
    expected = alpha * nll(student, gold) + (1 - alpha) * kl(teacher, student)
    assert torch.allclose(whole, expected)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("chunk", [1, 3, 100])
@pytest.mark.parametrize("bias", [False, True])
def test_from_hidden_equals_projecting_first(alpha: float, chunk: int, bias: bool) -> None:
    """The memory trick is exact: same value and same gradient as full logits, for every chunk size."""
    torch.manual_seed(0)
    head = torch.nn.Linear(7, 13, bias=bias).double().requires_grad_(False)
    student = torch.randn(10, 7, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(10, 7, dtype=torch.float64)
    gold = torch.randint(13, (10,))
    lean = objective_from_hidden(student, teacher, gold, head, alpha, chunk)
    (lean_gradient,) = torch.autograd.grad(lean * 2.5, student)
    plain = mixed(head(teacher), head(student), gold, alpha).mean()
    (plain_gradient,) = torch.autograd.grad(plain * 2.5, student)
    assert torch.allclose(lean, plain, atol=1e-12)
    assert torch.allclose(lean_gradient, plain_gradient, atol=1e-12)


def test_from_hidden_gradient_against_finite_differences() -> None:
    torch.manual_seed(1)
    head = torch.nn.Linear(5, 9, bias=False).double().requires_grad_(False)
    student = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(4, 5, dtype=torch.float64)
    gold = torch.randint(9, (4,))
    for alpha in (0.0, 0.4, 1.0):
        torch.autograd.gradcheck(
            lambda x, alpha=alpha: objective_from_hidden(x, teacher, gold, head, alpha, 3), (student,)
        )


def test_unknown_objective_and_bad_alpha_are_named() -> None:
    with pytest.raises(ValueError, match="objective must be one of kl, nll, mixed"):
        weight_of_nll("mse", 0.5)
    with pytest.raises(ValueError, match="alpha must lie"):
        weight_of_nll("mixed", 1.5)
    with pytest.raises(ValueError, match="teacher"):
        objective_from_hidden(torch.zeros(1, 2), None, torch.zeros(1).long(), torch.nn.Linear(2, 3), 0.5)
