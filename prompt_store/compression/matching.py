"""Attention matching: fit σ layer by layer so that attention over it gives what attention over the context
gives.

For every layer l alone, over the teacher's observed queries q, own keys and values:

    σ_l = argmin  Σ ‖A(q; σ_l, own) − A(q; c, own)‖² / Σ ‖A(q; c, own)‖²

where A(q; p, own) is causal attention over a prefix p and the row's own tokens. No layer waits for another
and neither MLP nor lm_head is computed, so that a step costs a fraction of a training step: it gives training
a far better start than the context's bare KV. After Attention Matching (arXiv 2602.16284), with gradient
steps for its closed forms.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prompt_store.compression.decoder import Prefix
from prompt_store.compression.schedule import learning_rate_factor
from prompt_store.compression.teacher import Observed


@dataclass(frozen=True)
class MatchingSettings:
    """`steps` of Adam over the observed batches in turn, cut short after `seconds`."""

    steps: int = 200
    seconds: float | None = None
    key_rate: float = 0.15
    value_rate: float = 0.02


@dataclass(frozen=True)
class LayerView:
    """One layer of an observed batch: query, output [batch, heads, tokens, head_dim], key, value [batch, kv_heads,
    tokens, head_dim], valid [batch, tokens]."""

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    valid: Tensor

    @classmethod
    def of(cls, observed: Observed, layer: int, dtype: torch.dtype) -> LayerView:
        parts = (observed.query, observed.key, observed.value, observed.output)
        query, key, value, output = (part[layer].to(dtype) for part in parts)
        return cls(query, key, value, output, observed.valid)


def attend(seen: LayerView, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """Attention outputs [batch, heads, tokens, head_dim] of the observed queries over σ and their own tokens.

    `keys` and `values` are σ's in this layer, [kv_heads, n, head_dim].
    """
    batch, heads, tokens, dim = seen.query.shape
    kv_heads, length = keys.shape[0], keys.shape[1]
    rows = heads // kv_heads * tokens
    query = (seen.query * scale).reshape(batch, kv_heads, rows, dim)
    future = torch.full((tokens, tokens), float("-inf"), dtype=keys.dtype, device=keys.device).triu(1)
    own = query @ seen.key.transpose(-1, -2) + future.repeat(heads // kv_heads, 1)
    shared = query.transpose(0, 1).reshape(kv_heads, batch * rows, dim) @ keys.transpose(-1, -2)
    shared = shared.view(kv_heads, batch, rows, length).transpose(0, 1)
    weights = torch.cat((shared, own), dim=-1).softmax(-1)
    before, after = torch.split(weights, [length, tokens], dim=-1)
    before = before.transpose(0, 1).reshape(kv_heads, batch * rows, length) @ values
    output: Tensor = before.view(kv_heads, batch, rows, dim).transpose(0, 1) + after @ seen.value
    return output.reshape(batch, heads, tokens, dim)


def matching_error(seen: LayerView, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """The relative squared error of one layer, a scalar."""
    valid = seen.valid[:, None, :, None]
    target = seen.output * valid
    error = (attend(seen, keys, values, scale) * valid - target).square().sum()
    return error / target.square().sum().clamp_min(1e-12)


def fit(
    start: Prefix,
    observed: Sequence[Observed],
    settings: MatchingSettings,
    scale: float,
    clock: Callable[[], float] = time.monotonic,
    on_step: Callable[[int, float], None] | None = None,
) -> Prefix:
    """σ of kind `kv` from `start`, its slot 0 kept. Deterministic as long as `seconds` does not cut it short."""
    if not observed:
        return start
    keys = start.keys.transpose(1, 2).clone(memory_format=torch.contiguous_format)
    values = start.values.transpose(1, 2).clone(memory_format=torch.contiguous_format)
    groups = [
        {"params": [keys], "lr": settings.key_rate, "rate": settings.key_rate},
        {"params": [values], "lr": settings.value_rate, "rate": settings.value_rate},
    ]
    optimiser = torch.optim.Adam(groups, betas=(0.9, 0.95))
    keys.grad, values.grad = torch.zeros_like(keys), torch.zeros_like(values)
    began = clock()
    for step in range(settings.steps):
        fraction = step / settings.steps
        if settings.seconds is not None:
            fraction = max(fraction, (clock() - began) / settings.seconds)
            if fraction >= 1:
                break
        for group in optimiser.param_groups:
            group["lr"] = group["rate"] * learning_rate_factor(fraction, 0.03, 0.0)
        error = _fill_gradients(observed[step % len(observed)], keys, values, scale)
        optimiser.step()
        if on_step is not None:
            on_step(step + 1, error)
    return Prefix(keys.transpose(1, 2), values.transpose(1, 2))


def _fill_gradients(observed: Observed, keys: Tensor, values: Tensor, scale: float) -> float:
    """Put each layer's gradient into keys.grad and values.grad (0 for slot 0); returns the mean error.

    Layer by layer, because a layer's tensors then stay in the processor's cache: three times as fast as at once.
    """
    assert keys.grad is not None
    assert values.grad is not None
    total = 0.0
    for layer in range(keys.shape[0]):
        own_keys, own_values = keys[layer].detach().requires_grad_(), values[layer].detach().requires_grad_()
        seen = LayerView.of(observed, layer, keys.dtype)
        error = matching_error(seen, own_keys, own_values, scale)
        key_gradient, value_gradient = torch.autograd.grad(error, (own_keys, own_values))
        keys.grad[layer], values.grad[layer] = key_gradient, value_gradient
        total += float(error.detach())
    keys.grad[:, :, 0], values.grad[:, :, 0] = 0, 0
    return total / keys.shape[0]
