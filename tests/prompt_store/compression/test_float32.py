"""Float32 as the yardstick: exact whatever the weights are stored as, and what compression is held against."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from softbatch.prompt_store.compression.frozen.frozen_model import Decoder
from softbatch.prompt_store.float32 import computing_in_float32
from tests.support.families import FAMILIES

TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


def make(kind: str, dtype: torch.dtype = torch.bfloat16, **fields: Any) -> Any:
    torch.manual_seed(3)
    config = AutoConfig.for_model(kind, **(FAMILIES[kind] | fields))
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
    return model.requires_grad_(False)


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "gpt2", "phi3"])
def test_weights_are_widened_while_they_compute(kind: str) -> None:
    model = make(kind)
    wide = copy.deepcopy(model).float()
    before = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    with computing_in_float32(model):
        logits = model(TOKENS).logits
    torch.testing.assert_close(logits, wide(TOKENS).logits, rtol=1e-5, atol=1e-5)
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == before
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model(TOKENS).logits.dtype == torch.bfloat16


def test_an_embedding_that_looks_up_other_rows_than_it_is_given() -> None:
    class Shifted(torch.nn.Embedding):
        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return super().forward(tokens + 2)

    table = Shifted(16, 4, dtype=torch.bfloat16)
    expected = table.weight.float()[TOKENS + 2]
    with computing_in_float32(table):
        torch.testing.assert_close(table(TOKENS), expected, rtol=0, atol=0)


def test_weights_stay_as_they_are_when_a_layer_fails() -> None:
    model = make("llama")
    with pytest.raises(RuntimeError), computing_in_float32(model):
        model(inputs_embeds=torch.zeros(1, 2, 31))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_a_model_that_bfloat16_rounds_far_can_be_compressed_for() -> None:
    """Large constant keys, as Qwen2.5 has: scores in bfloat16 lose what tells tokens apart."""
    model = make("qwen2")
    for layer in model.model.layers:
        layer.self_attn.k_proj.bias.fill_(1000.0)
    with computing_in_float32(model):
        exact = model(TOKENS).logits
    assert (model(TOKENS).logits.float() - exact).norm() / exact.norm() > 0.1
    Decoder(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_of_another_kind_is_refused(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match="the logits behind a prefix differ"):
        Decoder(make("gemma3_text", dtype, use_bidirectional_attention=True, sliding_window=1024))
