"""A model computed in float32 whatever its weights are stored as: the yardstick for every other way to run it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

# Float32 keeps 15 bits more than bfloat16, so whatever rounding does to a model whose bfloat16 carries anything at all,
# float32 does 2 ** -15 of it, at most about 4e-5 of the logits; the rest is room for sums in another order.
MAX_ERROR_IN_FLOAT32 = 1e-3
# How much more a right way to run a model may round than another one does in the same dtype.
ROUNDING_MARGIN = 2.0


@contextmanager
def computing_in_float32(model: nn.Module) -> Iterator[None]:
    """Every module computes with its weights widened while it runs, one at a time; they stay as they are."""
    narrow: list[tuple[nn.Module, nn.Parameter, torch.Tensor]] = []

    def widen(module: nn.Module, given: tuple[Any, ...]) -> None:
        for parameter in module.parameters(recurse=False):
            if parameter.dtype in (torch.bfloat16, torch.float16):
                narrow.append((module, parameter, parameter.data))
                parameter.data = _looked_up(module, parameter.data, given)

    def restore(module: nn.Module, *results: Any) -> None:
        while narrow and narrow[-1][0] is module:
            parameter, data = narrow.pop()[1:]
            parameter.data = data

    handles = []
    for module in model.modules():
        if next(module.parameters(recurse=False), None) is not None:
            handles.append(module.register_forward_pre_hook(widen))
            handles.append(module.register_forward_hook(restore, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for _, parameter, data in narrow[::-1]:
            parameter.data = data


def _looked_up(module: nn.Module, weight: torch.Tensor, given: tuple[Any, ...]) -> torch.Tensor:
    """The weight widened: of a plain embedding, the rows that it is asked for, since tables are large and texts short.
    Other kinds of embeddings may look up other rows than they are given."""
    if type(module).forward is not nn.Embedding.forward or not given:
        return weight.float()
    wide = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)  # untouched memory costs nothing
    rows = given[0].reshape(-1)
    wide[rows] = weight[rows].float()
    return wide


def allowed_error(rounding: float, dtype: torch.dtype) -> float:
    """How far logits in `dtype` may be off the yardstick, where one right way to run the model is off by `rounding`."""
    return max(ROUNDING_MARGIN * rounding, min(2 * torch.finfo(dtype).eps, 1.0), MAX_ERROR_IN_FLOAT32)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The distance of logits [..., vocab] from expected ones, relative to how far these spread."""
    spread = (expected - expected.mean(-1, keepdim=True)).norm().clamp_min(1e-6)
    return float((found.float() - expected).norm() / spread)
