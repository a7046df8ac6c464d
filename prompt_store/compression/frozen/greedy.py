"""Greedy answers of the model behind a prefix: the report's free-running answers of σ and its baselines."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from softbatch.prompt_store.compression.frozen.frozen_model import Decoder
from softbatch.prompt_store.compression.frozen.prefix import DecodeCache, LayerTrace, Prefix


def pad(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Token ids [rows, longest], padded on the right with 0 (hidden by causality, never read)."""
    width = max(len(row) for row in rows)
    return torch.tensor([list(row) + [0] * (width - len(row)) for row in rows], device=device)


@torch.no_grad()
def greedy(
    decoder: Decoder,
    prefix: Prefix | None,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    stop_ids: Collection[int],
    batch_size: int = 32,
    on_batch: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """The greedy continuation of each prompt behind the shared `prefix`, its stop token included."""
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    answers: list[list[int]] = [[] for _ in prompts]
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        rows = [prompts[index] for index in batch]
        for index, answer in zip(batch, _greedy_batch(decoder, prefix, rows, max_tokens, stop_ids), strict=True):
            answers[index] = answer
        if on_batch is not None:
            on_batch(len(batch))
    return answers


def _greedy_batch(
    decoder: Decoder,
    prefix: Prefix | None,
    rows: Sequence[Sequence[int]],
    max_tokens: int,
    stop_ids: Collection[int],
) -> list[list[int]]:
    shape, count = decoder.geometry, len(rows)
    lengths = torch.tensor([len(row) for row in rows], device=decoder.device)
    size = (shape.layers, count, shape.kv_heads, int(lengths.max()) + max_tokens, shape.head_dim)
    keys, values = (torch.zeros(size, dtype=decoder.dtype, device=decoder.device) for _ in range(2))
    cache = DecodeCache(keys, values, lengths)

    def keep(layer: int, trace: LayerTrace) -> None:
        cache.keys[layer, :, :, : trace.key.shape[2]] = trace.key
        cache.values[layer, :, :, : trace.value.shape[2]] = trace.value

    hidden = decoder.forward(decoder.embed(pad(rows, decoder.device)), prefix, on_layer=keep)
    hidden = hidden[torch.arange(count, device=decoder.device), lengths - 1]
    answers: list[list[int]] = [[] for _ in rows]
    running = [True] * count
    for step in range(max_tokens):
        chosen = decoder.project(hidden).argmax(-1)
        for row, token in enumerate(chosen.tolist()):
            if running[row]:
                answers[row].append(token)
                running[row] = token not in stop_ids
        if not any(running) or step == max_tokens - 1:
            break
        hidden = decoder.forward(decoder.embed(chosen[:, None]), prefix, cache=cache)[:, 0]
        cache.lengths += 1
    return answers
