"""Which experts a model sends its tokens to: of nearly equal ones, rounding takes another than float32 does.

A check that compares with float32 would then compare two models, so what it checks goes float32's way wherever that is
nearly its own. Where it is not, the result is as wrong as it was.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

# Of independent roundings a sum's error grows as the root of their number. Between two routers a token is rounded about
# so many times: norms, products, attention, the residual stream.
ROUNDINGS_PER_LAYER = 8
# What single scores are off beyond that: four standard deviations.
FAR = 4.0


@dataclass(frozen=True, eq=False)
class ExpertChoice:
    """Of one layer's router: scores [tokens, experts], and the experts taken [tokens, k]."""

    scores: torch.Tensor
    experts: torch.Tensor


@contextmanager
def recorded_choices() -> Iterator[list[ExpertChoice]]:
    """What routers choose meanwhile, layer by layer: transformers' take the k best of a token's scores."""
    found: list[ExpertChoice] = []

    def keep(layer: int, scores: torch.Tensor, chosen: Any) -> Any:
        found.append(ExpertChoice(scores.float(), chosen[1]))
        return chosen

    with _Routers(keep):
        yield found


@contextmanager
def followed_choices(choices: Sequence[ExpertChoice], tokens: range, dtype: torch.dtype) -> Iterator[None]:
    """Routers of one forward pass in `dtype` choose as `choices` do wherever their own scores differ by less than
    rounding; its last tokens are those that `choices` has as `tokens`."""

    def follow(layer: int, scores: torch.Tensor, chosen: Any) -> Any:
        if layer >= len(choices) or scores.shape[0] < len(tokens):
            return chosen
        wanted = choices[layer].experts[tokens.start : tokens.stop].to(scores.device)
        own = scores[scores.shape[0] - len(tokens) :]
        spread = (own.float() - own.float().mean(-1, keepdim=True)).square().mean(-1).sqrt()
        off = FAR * torch.finfo(dtype).eps / 2 * math.sqrt(ROUNDINGS_PER_LAYER * (layer + 1))
        gap = chosen[0][-len(tokens) :].amin(-1) - own.gather(-1, wanted).amin(-1)
        is_near = (gap.float() <= 2 * off * spread)[:, None]
        experts = chosen[1].clone()
        experts[-len(tokens) :] = torch.where(is_near, wanted, experts[-len(tokens) :])
        return torch.return_types.topk((scores.gather(-1, experts), experts))

    with _Routers(follow):
        yield


class _Routers(TorchFunctionMode):
    """Meanwhile `choose` has the last word where the k best of each token's scores are taken."""

    def __init__(self, choose: Any) -> None:
        super().__init__()
        self._choose = choose
        self._layer = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func not in (torch.topk, torch.Tensor.topk) or not args or args[0].dim() != 2:
            return result
        layer, self._layer = self._layer, self._layer + 1
        return self._choose(layer, args[0], result)
