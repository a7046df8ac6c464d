"""Packed linear layers compute what plain ones compute."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from softbatch.scheduler.model.onednn_linear import PackedLinear, pack_linears

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")


@needs_onednn
@pytest.mark.parametrize("rows", [1, 3, 32, 200])
@pytest.mark.parametrize("bias", [True, False])
def test_packed_equals_plain(rows: int, bias: bool) -> None:
    torch.manual_seed(rows)
    plain = nn.Linear(96, 160, bias=bias).bfloat16()
    inputs = torch.randn(1, rows, 96).bfloat16()
    with torch.inference_mode():
        torch.testing.assert_close(PackedLinear(plain)(inputs), plain(inputs), rtol=2e-2, atol=2e-2)


@needs_onednn
def test_only_bfloat16_is_packed_and_tied_embeddings_stay() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(10, 8), "a": nn.Linear(8, 8), "head": nn.Linear(8, 10, bias=False)})
    assert pack_linears(model) == 0
    model = model.bfloat16()
    model["head"].weight = model["embed"].weight
    assert pack_linears(model) == 2
    assert model["embed"].weight.shape == (10, 8)
    assert model["head"](torch.zeros(1, 0, 8, dtype=torch.bfloat16)).shape == (1, 0, 10)
