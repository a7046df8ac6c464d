"""Attention matching: σ, layer by layer, such that attention over it gives what attention over the context gives.

For every layer l alone, over the teacher's observed queries q, own keys and values:

    σ_l = argmin  Σ ‖A(q; σ_l, own) − A(q; c, own)‖² / Σ ‖A(q; c, own)‖²

where A(q; p, own) is causal attention over a prefix p and the row's own tokens. After Attention Matching (arXiv
2602.16284), in three moves: every head keeps the n keys of the context that get the most attention, as far from the
question as they were; the best values for given keys are linear least squares; between two such solutions gradient
steps move keys and values. No layer waits for another and neither MLP nor lm_head is computed, so that a step costs a
fraction of a training step: it gives training a far better start than the context's bare KV.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from prompt_store.compression.decoder import Decoder, Prefix, attend, attention_weights
from prompt_store.compression.initial import moved
from prompt_store.compression.job import replace_file
from prompt_store.compression.schedule import learning_rate_factor
from prompt_store.compression.teacher import Observed

# One observed batch in so many is enough to see which keys are attended to.
SELECTION_STRIDE = 3
# Of the mean diagonal, in the least squares: enough to keep a key that nobody looks at harmless.
RIDGE = 1e-3
CHECKPOINT_SECONDS = 15.0


@dataclass(frozen=True)
class MatchingSettings:
    """`steps` of Adam over the observed batches in turn, cut short after `seconds`."""

    steps: int = 250
    seconds: float | None = None
    key_rate: float = 0.1
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

    def rows(self, kv_heads: int) -> Tensor:
        """`valid` as attention_weights orders its rows, [batch * rows]."""
        return self.valid.repeat(1, self.query.shape[1] // kv_heads).reshape(-1)


@torch.no_grad()
def selected(decoder: Decoder, contexts: Sequence[Prefix], observed: Sequence[Observed], length: int) -> Prefix:
    """In every layer and kv head the context's first slot and the `length` − 1 others that get the most attention.

    Keys keep their distance to the question: they are turned as if the context ended right before slot `length`, so
    that attention over them is the teacher's, with the rest left out.
    """
    master = torch.promote_types(decoder.dtype, torch.float32)
    layers, kv_heads = contexts[0].keys.shape[0], contexts[0].keys.shape[2]
    keys = [moved(decoder, part.keys.to(master).transpose(1, 2), length - part.length) for part in contexts]
    mass = [torch.zeros(layers, kv_heads, part.length, dtype=master, device=decoder.device) for part in contexts]
    for seen in observed[::SELECTION_STRIDE]:
        for layer in range(layers):
            view = LayerView.of(seen, layer, master)
            before, _ = attention_weights(view.query, view.key, keys[seen.group][layer], decoder.scale)
            mass[seen.group][layer] += view.rows(kv_heads).to(master) @ before
    mass[0][:, :, 0] = torch.inf
    chosen = torch.cat(mass, dim=-1).topk(length, dim=-1).indices.sort(-1).values[..., None]
    chosen = chosen.expand(-1, -1, -1, keys[0].shape[-1])
    values = torch.cat([part.values.to(master).transpose(1, 2) for part in contexts], dim=2)
    return Prefix(
        torch.cat(keys, dim=2).gather(2, chosen).transpose(1, 2), values.gather(2, chosen).transpose(1, 2).contiguous()
    )


@torch.no_grad()
def with_best_values(start: Prefix, observed: Sequence[Observed], scale: float) -> Prefix:
    """The values that minimise the squared error for these keys: ridge regression on the attention weights, layer by
    layer, which draws towards the values there are. Slot 0 is kept."""
    keys, values = start.keys.transpose(1, 2), start.values.transpose(1, 2).contiguous()
    layers, kv_heads, length, dim = keys.shape
    for layer in range(layers):
        squares = keys.new_zeros(kv_heads, length, length)
        products = keys.new_zeros(kv_heads, length, dim)
        for seen in observed:
            view = LayerView.of(seen, layer, keys.dtype)
            before, _ = attention_weights(view.query, view.key, keys[layer], scale)
            missing = view.output - attend(view.query, view.key, view.value, keys[layer], values[layer], scale)
            missing = missing.reshape(missing.shape[0], kv_heads, -1, dim).transpose(0, 1).reshape(kv_heads, -1, dim)
            weights = (before * view.rows(kv_heads)[:, None]).transpose(1, 2)
            squares += weights @ before
            products += weights @ missing
        squares, products = squares[:, 1:, 1:], products[:, 1:]
        ridge = RIDGE * squares.diagonal(dim1=1, dim2=2).mean(-1) + torch.finfo(squares.dtype).tiny
        squares = squares + ridge[:, None, None] * torch.eye(length - 1, dtype=keys.dtype, device=keys.device)
        values[layer][:, 1:] += torch.linalg.solve(squares, products)
    return Prefix(start.keys, values.transpose(1, 2))


def matching_error(seen: LayerView, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """The relative squared error of one layer, a scalar."""
    valid = seen.valid[:, None, :, None]
    target = seen.output * valid
    found = attend(seen.query, seen.key, seen.value, keys, values, scale)
    error = (found * valid - target).square().sum()
    return error / target.square().sum().clamp_min(1e-12)


def fit(
    start: Prefix,
    observed: Sequence[Observed],
    settings: MatchingSettings,
    scale: float,
    clock: Callable[[], float] = time.monotonic,
    on_step: Callable[[int, float], None] | None = None,
    checkpoint: Path | None = None,
) -> Prefix:
    """σ of kind `kv` from `start`, its slot 0 kept. Deterministic as long as `seconds` does not cut it short.

    Every `CHECKPOINT_SECONDS` its state goes into `checkpoint`, from where another call takes it up.
    """
    start = with_best_values(start, observed, scale)
    keys = start.keys.transpose(1, 2).clone(memory_format=torch.contiguous_format)
    values = start.values.transpose(1, 2).clone(memory_format=torch.contiguous_format)
    groups = [
        {"params": [keys], "lr": settings.key_rate, "rate": settings.key_rate},
        {"params": [values], "lr": settings.value_rate, "rate": settings.value_rate},
    ]
    optimiser = torch.optim.Adam(groups, betas=(0.9, 0.95))
    keys.grad, values.grad = torch.zeros_like(keys), torch.zeros_like(values)
    first = _load(checkpoint, keys, values, optimiser) if checkpoint is not None and checkpoint.exists() else 0
    began = saved = clock()
    for step in range(first, settings.steps):
        fraction = step / settings.steps
        if settings.seconds is not None:
            fraction = max(fraction, (clock() - began) / settings.seconds)
            if fraction >= 1:
                break
        for group in optimiser.param_groups:
            group["lr"] = group["rate"] * learning_rate_factor(fraction, 0.03, 0.0)
        error = _fill_gradients(observed[step % len(observed)], keys, values, scale)
        optimiser.step()
        if checkpoint is not None and clock() - saved >= CHECKPOINT_SECONDS:
            _save(checkpoint, step + 1, keys, values, optimiser)
            saved = clock()
        if on_step is not None:
            on_step(step + 1, error)
    return with_best_values(Prefix(keys.transpose(1, 2), values.transpose(1, 2)), observed, scale)


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


def _save(path: Path, step: int, keys: Tensor, values: Tensor, optimiser: torch.optim.Optimizer) -> None:
    tensors = {"step": torch.tensor(step), "keys": keys.detach(), "values": values.detach()}
    for name, part in (("keys", keys), ("values", values)):
        tensors |= {f"{name}.{field}": torch.as_tensor(value) for field, value in optimiser.state[part].items()}
    replace_file(path, lambda target: save_file({n: t.cpu().contiguous() for n, t in tensors.items()}, target))


def _load(path: Path, keys: Tensor, values: Tensor, optimiser: torch.optim.Optimizer) -> int:
    """Returns the number of steps done. Raises ValueError when the file cannot be read."""
    try:
        tensors = load_file(path, device=str(keys.device))
        for name, part in (("keys", keys), ("values", values)):
            part.copy_(tensors[name])
            fields = {field: tensors[f"{name}.{field}"] for field in ("step", "exp_avg", "exp_avg_sq")}
            optimiser.state[part] = {**fields, "step": fields["step"].cpu()}
        return int(tensors["step"])
    except (OSError, KeyError, SafetensorError, RuntimeError) as error:
        raise ValueError(f"resume: {path.name} in the work directory cannot be read: {error}") from None
