"""What the model with the full context says and does: the targets of every objective.

Per pair the last hidden states of the answer positions, which are the whole distribution once projected, and,
for a spread of batches, what its attention did in every layer (see matching.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from softbatch.prompt_store.compression.frozen.frozen_model import Decoder
from softbatch.prompt_store.compression.frozen.pairs import Batch, collate
from softbatch.prompt_store.compression.frozen.prefix import LayerTrace, Prefix
from softbatch.prompt_store.compression.frozen.rendering import TrainingPair
from softbatch.prompt_store.compression.frozen.untrained_start import moved


@dataclass(frozen=True)
class Observed:
    """One batch's attention with the full context, moved to where the student's tokens stand: behind n
    tokens.

    query, output [layers, batch, heads, tokens, head_dim]; key, value [layers, batch, kv_heads, tokens,
    head_dim]; valid [batch, tokens] is False on padding; group is that of its pairs.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    valid: Tensor
    group: int = 0


@dataclass(frozen=True)
class TeacherOutputs:
    """`states[i]` [len(answer_i), hidden] for pair i, and the observed batches."""

    states: list[Tensor]
    observed: list[Observed]


@torch.no_grad()
def hidden_states_of(
    decoder: Decoder,
    prefixes: Sequence[Prefix | None],
    pairs: Sequence[TrainingPair],
    batch_size: int = 8,
    observe: int = 0,
    virtual_tokens: int = 0,
    on_batch: Callable[[int], None] | None = None,
) -> TeacherOutputs:
    """Run every pair behind the prefix of its group; about `observe` of them with their attention kept.

    Also the way to run any prefix over pairs: with one prefix and one group this is plain evaluation.
    """
    states: list[Tensor] = [torch.empty(0, device=decoder.device)] * len(pairs)
    observed: list[Observed] = []
    order = sorted(range(len(pairs)), key=lambda index: (pairs[index].group, pairs[index].length))
    batches = _same_group(order, pairs, batch_size)
    every = max(1, len(pairs) // observe) if observe else 0
    for number, indices in enumerate(batches):
        batch = collate(pairs, indices, decoder.device)
        prefix = prefixes[pairs[indices[0]].group]
        traces: list[LayerTrace] = []
        keep = bool(every) and number % every == every // 2
        hidden = decoder.forward(
            decoder.embed(batch.ids),
            prefix,
            on_layer=_collector(traces) if keep else None,
        )
        sizes = [len(pairs[index].answer) for index in indices]
        found = torch.split(hidden[batch.rows, batch.columns], sizes)
        for index, rows in zip(indices, found, strict=True):
            states[index] = rows.clone()
        if keep:
            shift = virtual_tokens - (prefix.length if prefix is not None else 0)
            observed.append(_observed(decoder, traces, batch, pairs, shift))
        if on_batch is not None:
            on_batch(len(indices))
    return TeacherOutputs(states, observed)


def without(
    pairs: Sequence[TrainingPair], teacher: TeacherOutputs, dropped: Sequence[int]
) -> tuple[list[TrainingPair], TeacherOutputs]:
    """The pairs and their states but for the dropped indices; nothing observed is kept."""
    kept = [index for index in range(len(pairs)) if index not in set(dropped)]
    return [pairs[index] for index in kept], TeacherOutputs([teacher.states[index] for index in kept], [])


def _collector(traces: list[LayerTrace]) -> Callable[[int, LayerTrace], None]:
    return lambda _, trace: traces.append(trace)


def _same_group(order: Sequence[int], pairs: Sequence[TrainingPair], batch_size: int) -> list[list[int]]:
    batches: list[list[int]] = []
    for index in order:
        full = not batches or len(batches[-1]) == batch_size
        if full or pairs[batches[-1][0]].group != pairs[index].group:
            batches.append([])
        batches[-1].append(index)
    return batches


def _observed(
    decoder: Decoder, traces: Sequence[LayerTrace], batch: Batch, pairs: Sequence[TrainingPair], shift: int
) -> Observed:
    lengths = torch.tensor([pairs[index].length for index in batch.indices], device=decoder.device)
    valid = torch.arange(batch.ids.shape[1], device=decoder.device)[None] < lengths[:, None]
    return Observed(
        moved(decoder, torch.stack([trace.query for trace in traces]), shift),
        moved(decoder, torch.stack([trace.key for trace in traces]), shift),
        torch.stack([trace.value for trace in traces]),
        torch.stack([trace.output for trace in traces]),
        valid,
        pairs[batch.indices[0]].group,
    )
