"""Rotary positions that turn by the length of a sequence, in models that know one length for a whole batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from softbatch.scheduler.model.family import BY_LENGTH, Family


class RotaryByLength:
    """Lets transformers' own modules turn each token of a step as its sequence asks for.

    They choose for all tokens of a call, by the largest position. So they are called twice: as in a short sequence, and
    with one position more that no short sequence has.
    """

    def __init__(self, model: Any) -> None:
        rule = Family.of(model.config).length_rule
        self.original = None if rule is None else rule.original
        self._modules = [module for module in model.modules() if BY_LENGTH.intersection(_kinds(module).values())]

    @contextmanager
    def of(self, lengths: torch.Tensor | None) -> Iterator[None]:
        """Meanwhile tokens turn as in sequences of `lengths` [T], which a model must be given that asks for them."""
        if self.original is None:
            yield
            return
        if lengths is None:
            raise ValueError("the batch has no lengths for positions that turn by them")
        is_long = (lengths > self.original)[None, :, None]
        for module in self._modules:
            module.forward = partial(self._turns, module.forward, is_long)
        try:
            yield
        finally:
            for module in self._modules:
                del module.forward

    def _turns(
        self,
        forward: Any,
        is_long: torch.Tensor,
        x: torch.Tensor,
        position_ids: torch.Tensor,
        *kind: Any,
        **options: Any,
    ) -> tuple[torch.Tensor, ...]:
        assert self.original is not None
        beyond = torch.full_like(position_ids[:, :1], self.original)
        short = forward(x, position_ids.clamp(max=self.original - 1), *kind, **options)
        long = forward(x, torch.cat((position_ids, beyond), dim=1), *kind, **options)
        return tuple(torch.where(is_long, *pair) for pair in zip((each[:, :-1] for each in long), short, strict=True))


def keep_long_frequencies(model: Any) -> None:
    """What transformers computes at the first long sequence becomes a buffer of its module, which others can read."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rule = Family.of(model.config).length_rule
    for module in model.modules():
        for prefix, kind in _kinds(module).items():
            if kind in BY_LENGTH and rule is not None:
                options = {"layer_type": prefix.removesuffix("_")} if prefix else {}
                device = getattr(module, f"{prefix}inv_freq").device
                frequencies, _ = ROPE_INIT_FUNCTIONS[kind](module.config, device, seq_len=rule.long, **options)
                module.register_buffer(f"{prefix}long_inv_freq", frequencies, persistent=False)


def _kinds(module: Any) -> Mapping[str, str]:
    """How a rotary module turns, by what its attributes begin with; nothing for any other module."""
    kind = getattr(module, "rope_type", None)
    if isinstance(kind, Mapping):
        return {f"{layers}_": each for layers, each in kind.items()}
    return {"": kind} if isinstance(kind, str) else {}
