"""Batched sampling whose outcome for one sequence depends on its logits, parameters, seed and position alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from scheduler.messages import SamplingParams, TokenLogprobs

GREEDY_BELOW = 1e-5
MAX_LOGPROBS = 20
# Filters look at this many of the most probable tokens first; the rare row that needs more is sorted whole.
HEAD = 1024


@dataclass(frozen=True)
class SampleInput:
    """One row: its parameters, all its tokens so far (prompt first), and the position being sampled."""

    params: SamplingParams
    tokens: Sequence[int]
    num_prompt: int
    position: int


@dataclass(frozen=True)
class Sample:
    """`error` set: the row's logits are not finite and nothing was sampled."""

    token_id: int
    logprobs: TokenLogprobs | None = None
    error: str | None = None


def sample(logits: torch.Tensor, inputs: Sequence[SampleInput]) -> list[Sample]:
    """Choose one token per row of `logits` [rows, vocab].

    Order: penalties, temperature, top-k, top-p within what top-k left, min-p relative to the most probable token.
    Log-probabilities are those of the model, before all of these.
    """
    logits = logits.float()
    raw = logits
    if any(_penalised(row.params) for row in inputs):
        logits = logits.clone()
        for index, row in enumerate(inputs):
            if _penalised(row.params):
                _penalise(logits[index], row)
    finite = torch.isfinite(logits.amax(dim=-1)).tolist()
    tokens = logits.argmax(dim=-1).tolist()
    sampled = [i for i, row in enumerate(inputs) if finite[i] and row.params.temperature >= GREEDY_BELOW]
    if sampled:
        rows = [inputs[i] for i in sampled]
        drawn = _draw(logits[torch.tensor(sampled, device=logits.device)], rows)
        for index, token in zip(sampled, drawn, strict=True):
            tokens[index] = token
    logprobs = _logprobs(raw, tokens, inputs)
    return [
        Sample(tokens[i], logprobs.get(i)) if finite[i] else Sample(-1, error="the model's logits are not finite")
        for i in range(len(inputs))
    ]


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that seed and position alone decide (Philox, Salmon et al. 2011: a counter, no state)."""
    return float(np.random.Generator(np.random.Philox(key=seed, counter=position)).random())


def _penalised(params: SamplingParams) -> bool:
    return params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0


def _penalise(logits: torch.Tensor, row: SampleInput) -> None:
    """In place, on one row [vocab]. Repetition (CTRL, 1909.05858) looks at prompt and output, the others at output."""
    params = row.params
    if params.repetition_penalty != 1.0:
        seen = torch.tensor(sorted(set(row.tokens)), device=logits.device)
        scores = logits[seen]
        factor = params.repetition_penalty
        logits[seen] = torch.where(scores > 0, scores / factor, scores * factor)
    output = row.tokens[row.num_prompt :]
    if output and (params.presence_penalty != 0.0 or params.frequency_penalty != 0.0):
        ids, counts = torch.unique(torch.tensor(output, device=logits.device), return_counts=True)
        logits[ids] -= params.presence_penalty + params.frequency_penalty * counts.to(logits.dtype)


def _draw(logits: torch.Tensor, rows: Sequence[SampleInput]) -> list[int]:
    """Inverse-CDF sampling with one uniform number per row; all filters are cuts in the sorted distribution."""
    device = logits.device
    temperature = torch.tensor([row.params.temperature for row in rows], device=device)
    probs = torch.softmax(logits / temperature[:, None], dim=-1)
    numbers = [uniform(row.params.seed, row.position) for row in rows]
    filtered = [i for i, row in enumerate(rows) if _filters(row.params)]
    plain = [i for i, row in enumerate(rows) if not _filters(row.params)]
    tokens = [0] * len(rows)
    if plain:
        chosen = _invert(probs[plain], torch.tensor([numbers[i] for i in plain], device=device))
        for index, token in zip(plain, chosen.tolist(), strict=True):
            tokens[index] = token
    if filtered:
        head, ids = probs[filtered].topk(min(HEAD, probs.shape[-1]), dim=-1)
        for at, index in enumerate(filtered):
            kept = _cut(head[at], rows[index].params)
            order = ids[at]
            if kept == head.shape[-1] < probs.shape[-1]:
                whole, order = probs[index].sort(descending=True)
                kept = _cut(whole, rows[index].params)
                values = whole[:kept]
            else:
                values = head[at, :kept]
            chosen = _invert(values[None], torch.tensor([numbers[index]], device=device))
            tokens[index] = int(order[chosen[0]])
    return tokens


def _filters(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0


def _cut(values: torch.Tensor, params: SamplingParams) -> int:
    """How many of the descending probabilities [n] survive all filters; at least one."""
    kept = values.shape[0]
    if params.top_k > 0:
        kept = min(kept, params.top_k)
    if params.top_p < 1.0:
        mass = values[:kept].double().cumsum(0)
        total = float(mass[-1]) if params.top_k > 0 else 1.0
        kept = min(kept, int((mass < params.top_p * total).sum()) + 1)
    if params.min_p > 0.0:
        kept = min(kept, int((values[:kept] >= params.min_p * values[0]).sum()))
    return max(1, kept)


def _invert(probs: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """The index at which each row's cumulative mass passes its number; never one of probability zero."""
    mass = probs.double().cumsum(dim=-1)
    target = numbers.double() * mass[:, -1]
    index = torch.searchsorted(mass, target[:, None], right=True)[:, 0]
    last = probs.shape[-1] - 1 - (probs > 0).flip(-1).int().argmax(dim=-1)
    return torch.minimum(index, last)


def _logprobs(logits: torch.Tensor, tokens: Sequence[int], inputs: Sequence[SampleInput]) -> dict[int, TokenLogprobs]:
    wanted = [i for i, row in enumerate(inputs) if row.params.logprobs is not None]
    if not wanted:
        return {}
    table = torch.log_softmax(logits[torch.tensor(wanted, device=logits.device)], dim=-1)
    chosen = table.gather(1, torch.tensor([[tokens[i]] for i in wanted], device=logits.device))[:, 0].tolist()
    most = min(MAX_LOGPROBS, table.shape[-1])
    top = table.topk(most, dim=-1)
    values, ids = top.values.tolist(), top.indices.tolist()
    result = {}
    for at, index in enumerate(wanted):
        count = min(inputs[index].params.logprobs or 0, most)
        result[index] = TokenLogprobs(chosen[at], ids[at][:count], values[at][:count])
    return result
