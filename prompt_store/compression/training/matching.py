"""Attention matching: σ, layer by layer, such that attention over it gives what attention over the context gives.

For every layer l alone, over the teacher's observed queries q, own keys and values:

    σ_l = argmin  Σ ‖A(q; σ_l, own) − A(q; c, own)‖² / Σ ‖A(q; c, own)‖²

where A(q; p, own) is causal attention over a prefix p and the row's own tokens. After Attention Matching (arXiv
2602.16284), in three moves: every head keeps the n keys of the context that get the most attention, as far from the
question as they were; the best values for given keys are linear least squares; between two such solutions gradient
steps move keys and values. No layer waits for another and neither MLP nor lm_head is computed, so that a step costs a
fraction of a training step: it gives training a far better start than the context's bare KV. Of kind `embeddings`
only the gradient steps apply, through what the model makes of the n embeddings.
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

from softbatch.prompt_store.atomic_files import replace_file
from softbatch.prompt_store.compression.compression_settings import MatchingSettings
from softbatch.prompt_store.compression.frozen.frozen_model import Decoder
from softbatch.prompt_store.compression.frozen.prefix import (
    Attend,
    Prefix,
    attend,
    attend_within,
    attention_weights,
    weighted_values,
)
from softbatch.prompt_store.compression.frozen.untrained_start import moved
from softbatch.prompt_store.compression.training.hidden_states import Observed
from softbatch.prompt_store.compression.training.schedule import learning_rate_factor
from softbatch.prompt_store.compression.training.student import Student

# One observed batch in so many is enough to see which keys are attended to.
SELECTION_STRIDE = 3
# Of the mean diagonal, in the least squares: enough to keep a key that nobody looks at harmless.
RIDGE = 1e-3
# And for each observed row: in a head that hardly looks at σ, where the mean is next to nothing, values stay put.
FLOOR = 1e-8
CHECKPOINT_SECONDS = 15.0


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
    """In every layer and kv head the `length` slots that get the most attention, the context's first among them if the
    layer sees it.

    Keys keep their distance to the question: they are turned as if the context ended right before slot `length`, so
    that attention over them is the teacher's, with the rest left out.
    """
    master = torch.promote_types(decoder.dtype, torch.float32)
    layers, kv_heads = contexts[0].keys.shape[0], contexts[0].keys.shape[2]
    keys = [moved(decoder, part.keys.to(master).transpose(1, 2), length - part.length) for part in contexts]
    mass = [torch.zeros(layers, kv_heads, part.length, dtype=master, device=decoder.device) for part in contexts]
    for group, part in enumerate(mass):
        looked_at = [seen for seen in observed if seen.group == group][::SELECTION_STRIDE]
        rows = sum(int(seen.valid.sum()) for seen in looked_at)
        for seen in looked_at:
            for layer in range(layers):
                view = LayerView.of(seen, layer, master)
                window = decoder.windows[layer]
                before, _ = attention_weights(view.query, view.key, keys[group][layer], decoder.scale, window)
                part[layer] += view.rows(kv_heads).to(master) @ before / rows
    for layer, window in enumerate(decoder.windows):
        if window is None or window > contexts[0].length:  # elsewhere no question sees the context's first slot
            mass[0][layer, :, 0] = torch.inf
    chosen = torch.cat(mass, dim=-1).topk(length, dim=-1).indices.sort(-1).values[..., None]
    chosen = chosen.expand(-1, -1, -1, keys[0].shape[-1])
    values = torch.cat([part.values.to(master).transpose(1, 2) for part in contexts], dim=2)
    return Prefix(
        torch.cat(keys, dim=2).gather(2, chosen).transpose(1, 2), values.gather(2, chosen).transpose(1, 2).contiguous()
    )


@torch.no_grad()
def with_best_values(
    start: Prefix, observed: Sequence[Observed], scale: float, windows: Sequence[int | None] = ()
) -> Prefix:
    """The values that minimise the squared error for these keys: ridge regression on the attention weights, layer by
    layer, which draws towards the values there are. Slot 0 is kept."""
    keys = start.keys.transpose(1, 2)
    values = start.values.transpose(1, 2).clone(memory_format=torch.contiguous_format)
    layers, kv_heads, length, dim = keys.shape
    for layer in range(layers):
        squares = keys.new_zeros(kv_heads, length, length)
        products = keys.new_zeros(kv_heads, length, dim)
        rows = 0
        for seen in observed:
            view = LayerView.of(seen, layer, keys.dtype)
            window = windows[layer] if windows else None
            before, after = attention_weights(view.query, view.key, keys[layer], scale, window)
            missing = view.output - weighted_values(before, after, view.value, values[layer])
            missing = missing.reshape(missing.shape[0], kv_heads, -1, dim).transpose(0, 1).reshape(kv_heads, -1, dim)
            weights = (before * view.rows(kv_heads)[:, None]).transpose(1, 2)
            rows += int(view.rows(kv_heads).sum())
            squares += weights @ before
            products += weights @ missing
        squares, products = squares[:, 1:, 1:], products[:, 1:]
        ridge = RIDGE * squares.diagonal(dim1=1, dim2=2).mean(-1) + FLOOR * rows
        squares = squares + ridge[:, None, None] * torch.eye(length - 1, dtype=keys.dtype, device=keys.device)
        values[layer][:, 1:] += torch.linalg.solve(squares, products)
    return Prefix(start.keys, values.transpose(1, 2))


def matching_error(
    seen: LayerView,
    keys: Tensor,
    values: Tensor,
    scale: float,
    attention: Attend = attend,
    window: int | None = None,
) -> Tensor:
    """The relative squared error of one layer, a scalar."""
    valid = seen.valid[:, None, :, None]
    target = seen.output * valid
    found = attend_within(window, attention, seen.query, seen.key, seen.value, keys, values, scale)
    error = (found * valid - target).square().sum()
    return error / target.square().sum().clamp_min(1e-12)


def fit(
    student: Student,
    observed: Sequence[Observed],
    settings: MatchingSettings,
    clock: Callable[[], float] = time.monotonic,
    on_step: Callable[[int, float], None] | None = None,
    checkpoint: Path | None = None,
) -> None:
    """Match the student to the observed batches. Deterministic where no `seconds` are set: they steer the rates.

    Every `CHECKPOINT_SECONDS`, and when `on_step` raises, its state goes into `checkpoint`, from where another call
    takes it up.
    """
    resumes = checkpoint is not None and checkpoint.exists()
    solving = clock()
    if not resumes:
        _solve(student, observed)
    solving = clock() - solving  # once more at the end, within the same time
    seconds = None if settings.seconds is None else max(0.01, settings.seconds - 2 * solving)
    rates = {"keys": settings.key_rate, "values": settings.value_rate, "embeddings": settings.embedding_rate}
    groups = [{"params": [part], "rate": rates[name]} for name, part in student.trainable.items()]
    optimiser = torch.optim.Adam(groups, betas=(0.9, 0.95))
    first, spent = _load(checkpoint, student, optimiser) if checkpoint is not None and resumes else (0, 0.0)
    saved = clock()
    began = saved - spent
    for step in range(first, settings.steps):
        fraction = step / settings.steps
        if seconds is not None:
            fraction = max(fraction, (clock() - began) / seconds)
            if fraction >= 1:
                break
        for group in optimiser.param_groups:
            group["lr"] = group["rate"] * learning_rate_factor(fraction, 0.03, 0.0)
        optimiser.zero_grad(set_to_none=True)
        error = _fill_gradients(observed[step % len(observed)], student)
        optimiser.step()
        if checkpoint is not None and clock() - saved >= CHECKPOINT_SECONDS:
            _save(checkpoint, step + 1, clock() - began, student, optimiser)
            saved = clock()
        if on_step is not None:
            try:
                on_step(step + 1, error)
            except BaseException:
                if checkpoint is not None:
                    _save(checkpoint, step + 1, clock() - began, student, optimiser)
                raise
    _solve(student, observed)


def _solve(student: Student, observed: Sequence[Observed]) -> None:
    """Only values that are free, and not what a model makes of embeddings, can be solved for."""
    if student.kind == "kv":
        decoder = student.decoder
        best = with_best_values(student.fixed_prefix(), observed, decoder.scale, decoder.windows)
        student.load({"keys": best.keys, "values": best.values})


def _fill_gradients(observed: Observed, student: Student) -> float:
    """Add the error's gradient to that of the trainable tensors; returns the error, a mean over the layers.

    Layer by layer, because a layer's tensors then stay in the processor's cache: three times as fast as at once.
    """
    prefix = student.prefix()
    master = torch.promote_types(prefix.keys.dtype, torch.float32)
    keys, values = prefix.keys.detach().to(master).transpose(1, 2), prefix.values.detach().to(master).transpose(1, 2)
    gradients = torch.empty_like(keys), torch.empty_like(values)
    decoder, total = student.decoder, 0.0
    for layer in range(keys.shape[0]):
        own = keys[layer].clone().requires_grad_(), values[layer].clone().requires_grad_()
        view = LayerView.of(observed, layer, master)
        error = matching_error(view, *own, decoder.scale, decoder.kernels.attend, decoder.windows[layer])
        gradients[0][layer], gradients[1][layer] = torch.autograd.grad(error, own)
        total += float(error.detach())
    towards = [gradient.transpose(1, 2).to(prefix.keys.dtype) for gradient in gradients]
    torch.autograd.backward([prefix.keys, prefix.values], towards)
    return total / keys.shape[0]


def _save(path: Path, step: int, spent: float, student: Student, optimiser: torch.optim.Optimizer) -> None:
    tensors = {"step": torch.tensor(step, device="cpu")}
    tensors["spent"] = torch.tensor(spent, dtype=torch.float64, device="cpu")
    for name, part in student.trainable.items():
        tensors[name] = part.detach()
        tensors |= {f"{name}.{field}": torch.as_tensor(value) for field, value in optimiser.state[part].items()}
    replace_file(path, lambda target: save_file({n: t.cpu().contiguous() for n, t in tensors.items()}, target))


def _load(path: Path, student: Student, optimiser: torch.optim.Optimizer) -> tuple[int, float]:
    """Returns the steps done and the seconds spent. Raises ValueError when the file cannot be read."""
    try:
        tensors = load_file(path, device=str(student.decoder.device))
        for name, part in student.trainable.items():
            with torch.no_grad():
                part.copy_(tensors[name])
            fields = {field: tensors[f"{name}.{field}"] for field in ("step", "exp_avg", "exp_avg_sq")}
            optimiser.state[part] = {**fields, "step": fields["step"].cpu()}
        return int(tensors["step"]), float(tensors["spent"])
    except (OSError, KeyError, SafetensorError, RuntimeError) as error:
        raise ValueError(f"resume: {path.name} in the work directory cannot be read: {error}") from None
