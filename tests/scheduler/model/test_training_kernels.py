"""What soft prompts are trained through in C++, against transformers, torch and their gradients."""

from __future__ import annotations

import copy
import shutil
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig

from softbatch.prompt_store.compression.frozen.frozen_model import Decoder, Kernels
from softbatch.prompt_store.compression.frozen.prefix import attend as attend_in_torch
from softbatch.prompt_store.compression.objectives import mixed, objective_from_hidden
from softbatch.scheduler.model.cpu import ops
from softbatch.scheduler.model.cpu.build import build
from softbatch.scheduler.model.cpu.formats import WeightFormat
from softbatch.scheduler.model.llama.decoder import plain_weights
from softbatch.scheduler.model.llama.training import (
    CpuModelKernels,
    behind_prefix_with_gradients,
    kernels_of,
    objective,
)
from tests.support.decoders import CONFIGS, LIKE_LLAMA, WITH_WINDOWS, make_model
from tests.support.models import in_threads

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")


def attend(_: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)


def opened(model: Any) -> CpuModelKernels:
    kernels = kernels_of(copy.deepcopy(model))
    assert kernels is not None
    return kernels


def inputs_of(model: Any, batch: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings, positions and the gradient that the hidden states are given."""
    generator = torch.Generator().manual_seed(batch * tokens)
    embeds = torch.randn(batch, tokens, model.config.hidden_size, generator=generator)
    gradient = torch.randn(embeds.shape, generator=generator)
    return embeds.to(model.dtype), torch.arange(7, 7 + tokens)[None], gradient.to(model.dtype)


def through_transformers(model: Any, embeds: Tensor, positions: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    model = copy.deepcopy(model)
    model.set_attn_implementation("sdpa")
    embeds = embeds.clone().requires_grad_()
    hidden = model.model(inputs_embeds=embeds, position_ids=positions, use_cache=False).last_hidden_state
    return hidden.detach(), torch.autograd.grad(hidden, embeds, gradient)[0]


def through_kernels(model: Any, embeds: Tensor, positions: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    kernels = opened(model)
    embeds = embeds.clone().requires_grad_()
    hidden = kernels.run_layers(embeds, positions, attend)
    return hidden.detach(), torch.autograd.grad(hidden, embeds, gradient)[0]


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (3, 5), (2, 40)])
@pytest.mark.parametrize("name", LIKE_LLAMA)
def test_states_and_gradients_in_float32(name: str, batch: int, tokens: int, threads: int) -> None:
    model = make_model(CONFIGS[name], torch.float32)
    inputs = inputs_of(model, batch, tokens)
    with in_threads(threads):
        found = through_kernels(model, *inputs)
    for own, expected in zip(found, through_transformers(model, *inputs), strict=True):
        assert distance(own, expected) < 2e-5


@pytest.mark.parametrize("name", LIKE_LLAMA)
def test_states_and_gradients_in_bfloat16(name: str) -> None:
    """Nearer to those of the same weights in float32 than transformers in bfloat16, whose residuals are rounded."""
    model = make_model(CONFIGS[name], torch.bfloat16)
    embeds, positions, gradient = inputs_of(model, 3, 30)
    exact = through_transformers(copy.deepcopy(model).float(), embeds.float(), positions, gradient.float())
    theirs = through_transformers(model, embeds, positions, gradient)
    ours = through_kernels(model, embeds, positions, gradient)
    for own, other, expected in zip(ours, theirs, exact, strict=True):
        assert own.dtype == torch.bfloat16
        assert distance(own, expected) < min(0.05, distance(other, expected))


def test_without_gradients_they_are_the_same_states() -> None:
    model = make_model(CONFIGS["llama"], torch.float32)
    embeds, positions, gradient = inputs_of(model, 2, 9)
    kernels = opened(model)
    with torch.no_grad():
        states = kernels.run_layers(embeds, positions, attend)
    assert torch.equal(states, through_kernels(model, embeds, positions, gradient)[0])
    twice = kernels.run_layers(embeds, positions.expand(2, -1), attend)
    assert torch.equal(states, twice), "positions of every row"


@pytest.mark.parametrize("name", WITH_WINDOWS)
def test_attention_with_windows_is_the_callers(name: str) -> None:
    decoder = Decoder(make_model(CONFIGS[name], torch.float32), kernels=Kernels(of_model=kernels_of))
    assert isinstance(decoder._model_kernels, CpuModelKernels)  # and they passed the decoder's own check
    assert any(decoder.windows)


def test_models_that_they_do_not_compute() -> None:
    for name in CONFIGS.keys() - set(LIKE_LLAMA) - set(WITH_WINDOWS):
        assert kernels_of(make_model(CONFIGS[name], torch.float32)) is None, name
    odd = make_model(LlamaConfig(**{**CONFIGS["llama"].to_dict(), "vocab_size": 151}), torch.bfloat16)
    assert kernels_of(odd) is None
    assert odd.model.layers[0].mlp.up_proj.weight is not None, "and is left whole"
    assert kernels_of(make_model(CONFIGS["llama"], torch.float16)) is None


def test_what_does_not_fit_is_refused_before_anything_is_read() -> None:
    assert build()
    model = make_model(CONFIGS["llama"], torch.float32)
    kernels, size, dim = opened(model)._layers, model.config.hidden_size, model.model.layers[0].self_attn.head_dim
    rows, turns = torch.zeros(6, size), torch.zeros(6, dim // 2)
    heads = torch.zeros(2, model.config.num_attention_heads, 3, dim)
    middle, _, gate_up = kernels.behind_attention(0, rows, heads)
    for call in (
        lambda: kernels.into_attention(9, rows, turns, turns, 2),
        lambda: kernels.into_attention(0, rows[:, 1:], turns, turns, 2),
        lambda: kernels.into_attention(0, rows, turns[1:], turns, 2),
        lambda: kernels.into_attention(0, rows, turns, turns, 4),
        lambda: kernels.into_attention_backward(0, rows, turns, turns, [heads, heads, heads]),
        lambda: kernels.behind_attention(0, rows, heads[..., 1:]),
        lambda: kernels.behind_attention(0, rows, heads.bfloat16()),
        lambda: kernels.behind_attention_backward(0, middle, gate_up[1:], rows, 2),
        lambda: kernels.behind_attention_backward(0, middle, gate_up, rows[:4], 2),
    ):
        with pytest.raises(RuntimeError, match=r"must|no such layer|as it was returned|one gradient"):
            call()


def attention_case(
    batch: int, kv_heads: int, group: int, tokens: int, dim: int, length: int, dtype: torch.dtype, seed: int = 0
) -> tuple[list[Tensor], Tensor]:
    """Inputs of the attention behind a prefix, and the gradient that its output is given."""
    generator = torch.Generator().manual_seed(seed)
    own, shared = (batch, kv_heads, tokens, dim), (kv_heads, length, dim)
    query = (batch, kv_heads * group, tokens, dim)
    tensors = [torch.randn(shape, generator=generator).to(dtype) for shape in (query, own, own, shared, shared, query)]
    return tensors[:5], tensors[5]


def with_gradients(attention: Any, tensors: list[Tensor], gradient: Tensor) -> list[Tensor]:
    inputs = [tensor.clone().requires_grad_() for tensor in tensors]
    output = attention(*inputs, 0.3)
    return [output.detach(), *torch.autograd.grad(output, inputs, gradient)]


def check_attention(tensors: list[Tensor], gradient: Tensor, allowed: float) -> None:
    found = with_gradients(behind_prefix_with_gradients, tensors, gradient)
    expected = with_gradients(attend_in_torch, [tensor.double() for tensor in tensors], gradient.double())
    for own, exact in zip(found, expected, strict=True):
        assert own.dtype == gradient.dtype
        assert float((own.double() - exact).norm()) <= allowed * (float(exact.norm()) + 1e-6)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    batch=st.integers(1, 5),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 4),
    tokens=st.integers(1, 40),
    dim=st.sampled_from([8, 24, 40, 64, 96]),
    length=st.integers(1, 90),
    threads=st.integers(1, 3),
    seed=st.integers(0, 1 << 20),
)
def test_any_attention_behind_a_prefix_in_float32(threads: int, seed: int, **sizes: int) -> None:
    assert build()
    with in_threads(threads):
        check_attention(*attention_case(**sizes, dtype=torch.float32, seed=seed), allowed=2e-6)  # type: ignore[arg-type]


def test_attention_behind_a_prefix_in_bfloat16() -> None:
    assert build()
    check_attention(*attention_case(4, 3, 3, 50, 64, 64, torch.bfloat16), allowed=4e-3)


def test_attention_behind_a_prefix_whose_tensors_lie_otherwise() -> None:
    """As they come from a model: heads and tokens exchanged."""
    assert build()
    tensors, gradient = attention_case(3, 2, 2, 7, 16, 9, torch.float32)
    lie_otherwise = [tensor.transpose(-3, -2).contiguous().transpose(-3, -2) for tensor in tensors]
    turned = gradient.transpose(1, 2).contiguous().transpose(1, 2)
    found = with_gradients(behind_prefix_with_gradients, lie_otherwise, turned)
    for own, expected in zip(found, with_gradients(behind_prefix_with_gradients, tensors, gradient), strict=True):
        assert torch.equal(own, expected)


def test_attention_of_tensors_that_do_not_fit_is_refused() -> None:
    assert build()
    tensors, _ = attention_case(3, 2, 2, 7, 16, 9, torch.float32)
    for index, wrong in (
        (0, tensors[0][:, 1:]),
        (1, tensors[1][:, :, 1:]),
        (2, tensors[2][1:]),
        (3, tensors[3][1:]),
        (4, tensors[4][:, 1:]),
        (4, tensors[4].bfloat16()),
    ):
        with pytest.raises(RuntimeError, match="must be"):
            behind_prefix_with_gradients(*(wrong if i == index else tensor for i, tensor in enumerate(tensors)), 0.3)  # type: ignore[call-arg]
    with pytest.raises(RuntimeError, match="float32 or bfloat16"):
        behind_prefix_with_gradients(*(tensor.double() for tensor in tensors), 0.3)  # type: ignore[call-arg]


def objective_case(
    positions: int, vocab: int, size: int, dtype: torch.dtype, spread: float, with_bias: bool
) -> tuple[Any, Tensor, Tensor, Tensor]:
    """A head, the student's and the teacher's states, gold ids."""
    torch.manual_seed(positions * vocab)
    head = torch.nn.Linear(size, vocab, bias=with_bias).to(dtype).requires_grad_(False)
    student, teacher = (torch.randn(positions, size, dtype=torch.float32).to(dtype) * spread for _ in range(2))
    return head, student, teacher, torch.randint(vocab, (positions,))


def loss_and_gradient(objective: Any, student: Tensor) -> tuple[Tensor, Tensor]:
    student = student.clone().requires_grad_()
    loss = objective(student)
    return loss.detach(), torch.autograd.grad(3 * loss, student)[0]


def exact_objective(head: Any, teacher: Tensor, gold: Tensor, alpha: float, student: Tensor) -> Tensor:
    def project(states: Tensor) -> Tensor:
        return F.linear(states, head.weight.double(), None if head.bias is None else head.bias.double())

    return mixed(project(teacher.double()), project(student), gold, alpha).mean()


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("spread", [0.1, 20.0])
@pytest.mark.parametrize(("positions", "vocab", "size"), [(1, 40, 8), (57, 150, 24), (130, 1002, 64)])
def test_objective_in_float32(
    positions: int, vocab: int, size: int, spread: float, with_bias: bool, alpha: float
) -> None:
    assert build()
    head, student, teacher, gold = objective_case(positions, vocab, size, torch.float32, spread, with_bias)
    kernel = ops.make_objective(WeightFormat.FLOAT32, head.weight, head.bias)
    own = loss_and_gradient(partial(objective, kernel, teacher=teacher, gold=gold, alpha=alpha), student)
    exact = loss_and_gradient(partial(exact_objective, head, teacher, gold, alpha), student.double())
    assert float(own[0]) == pytest.approx(float(exact[0]), rel=1e-5, abs=1e-6)
    assert distance(own[1], exact[1]) < 1e-4


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_objective_in_bfloat16(alpha: float) -> None:
    """Logits are not rounded to bfloat16, as they are on their way through torch: it is nearer to the exact one."""
    assert build()
    head, student, teacher, gold = objective_case(70, 1002, 64, torch.bfloat16, 4.0, False)
    kernel = ops.make_objective(plain_weights(torch.bfloat16), head.weight, None)
    own = loss_and_gradient(partial(objective, kernel, teacher=teacher, gold=gold, alpha=alpha), student)
    exact = loss_and_gradient(partial(exact_objective, head, teacher, gold, alpha), student.double())
    theirs = loss_and_gradient(lambda states: objective_from_hidden(states, teacher, gold, head, alpha), student)
    assert own[1].dtype == torch.bfloat16
    assert abs(float(own[0] - exact[0])) <= abs(float(theirs[0] - exact[0])) + 1e-5
    assert distance(own[1], exact[1]) < min(0.01, distance(theirs[1], exact[1]))


def test_objective_of_what_is_no_number_is_none() -> None:
    assert build()
    head, student, teacher, gold = objective_case(5, 40, 8, torch.float32, 1.0, False)
    kernel = ops.make_objective(WeightFormat.FLOAT32, head.weight, None)
    student[2, 3] = float("nan")
    assert objective(kernel, student, teacher, gold, 0.0).isnan()


def test_objective_refuses_what_does_not_fit() -> None:
    assert build()
    head, student, teacher, gold = objective_case(5, 40, 8, torch.float32, 1.0, False)
    kernel = ops.make_objective(WeightFormat.FLOAT32, head.weight, None)
    for arguments in (
        (student[:, 1:].contiguous(), teacher, gold, 0.0),
        (student.double(), teacher, gold, 0.0),
        (student, teacher[1:], gold, 0.0),
        (student, None, gold, 0.5),
        (student, teacher, gold + 40, 0.0),
        (student, teacher, gold[1:], 0.0),
    ):
        with pytest.raises(RuntimeError, match="must be"):
            kernel.mean(*arguments)
