"""What changes a row's logits before its token is drawn: masks, biases, penalties, and tokens that are barred."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from softbatch.scheduler.model.staging import small_tensor
from softbatch.scheduler.protocol import SamplingParams

# Of eight tokens by their bits: those that are not allowed cannot be above -inf.
_CEILINGS = np.where(np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little"), np.inf, -np.inf)
_CEILINGS = _CEILINGS.astype(np.float32)
# Where a mask leaves no more tokens than this, nothing else of the row is looked at.
FEW = 1024


@dataclass(frozen=True)
class SampleInput:
    """One row: its parameters, all its tokens so far (prompt first), and the position being sampled.

    `pending`, int64 [1] on the device, is the newest of its tokens where the host does not know that yet. `barred` are
    tokens that may not be chosen. `mask`, int32 [ceil(vocab / 32)], has one bit per token that may be: None is
    for all."""

    params: SamplingParams
    tokens: Sequence[int]
    num_prompt: int
    position: int
    pending: torch.Tensor | None = None
    barred: Sequence[int] = ()
    mask: np.ndarray | None = None


def adjusted(logits: torch.Tensor, inputs: Sequence[SampleInput], few: Collection[int] = ()) -> torch.Tensor:
    """The logits to draw from. The given ones stay as they are if log-probabilities are to be told of them.

    No mask is written over the rows of `few`: whoever draws from those looks at the tokens that are allowed alone."""
    masked = [index for index, row in enumerate(inputs) if row.mask is not None and index not in few]
    biased = [index for index, row in enumerate(inputs) if row.params.logit_bias]
    others = [index for index, row in enumerate(inputs) if row.barred or needs_history(row.params)]
    if not (masked or biased or others):
        return logits
    if others or any(row.params.logprobs is not None for row in inputs):
        logits = logits.clone()
    if masked:
        _apply_masks(logits, masked, [mask for index in masked if (mask := inputs[index].mask) is not None])
    if biased:
        _add_biases(logits, biased, [inputs[index].params for index in biased])
    for index in others:
        row = inputs[index]
        if needs_history(row.params):
            _penalise(logits[index], row)
        if row.barred:
            logits[index, small_tensor(row.barred, logits.device, torch.int64)] = -torch.inf
    return logits


def needs_history(params: SamplingParams) -> bool:
    """Whether sampling needs the tokens so far, as penalties do."""
    return params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0


def allowed_mask(token_ids: Sequence[int], vocab_size: int) -> np.ndarray:
    """A row's `mask` that leaves only these tokens."""
    bits = np.zeros(-(-vocab_size // 32) * 32, dtype=np.bool_)
    bits[list(token_ids)] = True
    return np.packbits(bits, bitorder="little").view(np.int32)


def few_allowed(mask: np.ndarray | None, size: int) -> np.ndarray | None:
    """The tokens that a mask allows, ascending, if they are at most FEW; otherwise None. Those from `size` on, which a
    tokenizer may have beside the model's, are left out; None too if there are no others."""
    if mask is None:
        return None
    words = np.flatnonzero(mask)
    if len(words) > FEW:
        return None
    bits = np.unpackbits(mask[words].view(np.uint8), bitorder="little")
    at = np.flatnonzero(bits)
    if len(at) > FEW:
        return None
    tokens = words[at // 32] * 32 + at % 32
    tokens = tokens[tokens < size]
    return tokens if len(tokens) else None


def mask_without(mask: np.ndarray, barred: Iterable[int]) -> np.ndarray:
    """The mask without the `barred` tokens, unless it has no others."""
    left = mask.copy()
    for token in barred:
        left.view(np.uint8)[token // 8] &= ~np.uint8(1 << token % 8)
    return left if left.any() else mask


def ends_of_bad_words(params: SamplingParams, output: Sequence[int]) -> list[int]:
    """The tokens that would complete a bad word behind the `output`."""
    return [
        word[-1]
        for word in params.bad_words
        if len(word) == 1 or (len(output) >= len(word) - 1 and tuple(output[1 - len(word) :]) == word[:-1])
    ]


def _apply_masks(logits: torch.Tensor, rows: list[int], masks: Sequence[np.ndarray]) -> None:
    """In place: tokens that a row's mask leaves out become impossible."""
    size = logits.shape[-1]
    if logits.device.type == "cpu":
        table = logits.numpy()
        ceilings = np.empty((masks[0].nbytes, 8), dtype=np.float32)
        for row, mask in zip(rows, masks, strict=True):
            # Four times as fast as to write where a bit is.
            np.take(_CEILINGS, mask.view(np.uint8), axis=0, out=ceilings, mode="clip")
            np.minimum(table[row], ceilings.reshape(-1)[:size], out=table[row])
        return
    bits = torch.from_numpy(np.stack(masks)).to(logits.device, non_blocking=True)[..., None] >> torch.arange(
        32, device=logits.device
    )
    left_out = (bits & 1).flatten(1)[:, :size] == 0
    at = small_tensor(rows, logits.device, torch.int64)
    logits[at] = logits[at].masked_fill(left_out, -torch.inf)


def _add_biases(logits: torch.Tensor, rows: list[int], params: Sequence[SamplingParams]) -> None:
    """In place; of all rows in one operation."""
    at = [row for row, one in zip(rows, params, strict=True) for _ in one.logit_bias]
    tokens = [token for one in params for token in one.logit_bias]
    biases = [bias for one in params for bias in one.logit_bias.values()]
    places = (small_tensor(at, logits.device, torch.int64), small_tensor(tokens, logits.device, torch.int64))
    logits.index_put_(places, small_tensor(biases, logits.device, torch.float32), accumulate=True)


def _penalise(logits: torch.Tensor, row: SampleInput) -> None:
    """Penalise one row [vocab] in place. Repetition (CTRL, 1909.05858): prompt and output; the rest: output."""
    params = row.params
    if params.repetition_penalty != 1.0:
        seen = _with_pending(sorted(set(row.tokens)), row.pending, logits.device)
        scores = logits[seen]
        factor = params.repetition_penalty
        logits[seen] = torch.where(scores > 0, scores / factor, scores * factor)
    output = row.tokens[row.num_prompt :]
    if (output or row.pending is not None) and (params.presence_penalty != 0.0 or params.frequency_penalty != 0.0):
        ids = _with_pending(output, row.pending, logits.device)
        times = torch.zeros_like(logits).index_add_(0, ids, torch.ones_like(ids, dtype=logits.dtype))
        logits -= params.presence_penalty * (times > 0) + params.frequency_penalty * times


def _with_pending(tokens: Sequence[int], pending: torch.Tensor | None, device: torch.device) -> torch.Tensor:
    known = small_tensor(tokens, device, torch.int64)
    return known if pending is None else torch.cat([known, pending])
