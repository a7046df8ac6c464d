"""The self-check of a model with experts: rounding takes others of nearly equal ones, and nothing else may."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from softbatch.prompt_store.float32 import allowed_error, computing_in_float32, relative_error
from softbatch.scheduler.model.loader import load_transformers, spec_of
from softbatch.scheduler.model.routing import ExpertChoice, followed_choices, recorded_choices
from softbatch.scheduler.model.self_check import LENGTH, _eager, _paged, measure
from softbatch.scheduler.model.source import EMBEDDED_ALIAS, resolve
from tests.support.families import save_family

BFLOAT16 = torch.bfloat16


def test_only_nearly_equal_experts_are_exchanged() -> None:
    scores = torch.tensor([[0.0, 1.0, 1.001, 4.0], [0.0, 1.0, 2.0, 4.0], [0.0, 3.0, 2.0, 4.0]])
    wanted = ExpertChoice(torch.zeros(5, 4), torch.tensor([[9, 9], [3, 1], [3, 1], [3, 1], [9, 9]]))
    with followed_choices([wanted], range(1, 4), BFLOAT16):
        values, experts = torch.topk(scores, 2, dim=-1)
        assert torch.topk(scores, 1).indices.shape == (3, 1), "a layer that was not recorded chooses for itself"
    assert experts.tolist() == [[3, 1], [3, 2], [3, 1]]
    assert values.tolist() == [[4.0, 1.0], [4.0, 2.0], [4.0, 3.0]]
    assert torch.topk(scores, 2).indices.tolist() == [[3, 2], [3, 2], [3, 1]]


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    path = tmp_path_factory.mktemp("routing") / "mixtral"
    source = resolve(str(save_family(Path(path), resolve(EMBEDDED_ALIAS).path, "mixtral")))
    model, tokenizer = load_transformers(source, BFLOAT16, torch.device("cpu"))
    for layer in model.model.layers:  # two experts whose scores differ by less than rounding
        gate = layer.mlp.gate.weight
        gate[2] = gate[1]
        gate[2, ::8] *= 1.01
    return model, tokenizer


@torch.inference_mode()
def test_rounding_alone_exchanges_experts_and_costs_no_more_than_elsewhere(opened: tuple[Any, Any]) -> None:
    model, tokenizer = opened
    spec = spec_of("mixtral", model, tokenizer)
    yardstick = measure(model, spec, tokenizer)
    assert len(yardstick.choices) == 2
    assert yardstick.choices[0].experts.shape == (LENGTH, 2)
    alone = relative_error(_paged(model, spec, yardstick.tokens, [], BFLOAT16), yardstick.logits)
    assert yardstick.rounding < 0.02 < alone / 3


@torch.inference_mode()
def test_wrong_experts_are_still_refused(opened: tuple[Any, Any]) -> None:
    model, tokenizer = opened
    spec = spec_of("mixtral", model, tokenizer)
    yardstick = measure(model, spec, tokenizer)
    gate = model.model.layers[0].mlp.gate.weight
    right = gate.clone()
    gate.copy_(right.roll(1, 0))
    try:
        error = relative_error(_paged(model, spec, yardstick.tokens, yardstick.choices, BFLOAT16), yardstick.logits)
    finally:
        gate.copy_(right)
    assert error > 5 * allowed_error(yardstick.rounding, BFLOAT16)


@torch.inference_mode()
def test_in_float32_the_choices_are_its_own(opened: tuple[Any, Any]) -> None:
    model, _ = opened
    tokens = list(range(3, 3 + LENGTH))
    with computing_in_float32(model), recorded_choices() as choices:
        expected = _eager(model, tokens)
    with computing_in_float32(model), followed_choices(choices, range(LENGTH), torch.float32):
        assert torch.equal(_eager(model, tokens), expected)
