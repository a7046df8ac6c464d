"""Tokenised (z, ŷ) pairs, how they are batched, and the model's hidden states on their answers."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from softbatch.prompt_store.compression.frozen.frozen_model import Decoder
from softbatch.prompt_store.compression.frozen.greedy import pad
from softbatch.prompt_store.compression.frozen.prefix import Prefix
from softbatch.prompt_store.compression.frozen.rendering import TrainingPair


@dataclass(frozen=True)
class Batch:
    """Rows prompt + answer[:-1], padded on the right; `rows` and `columns` pick the states that predict
    `gold`."""

    indices: tuple[int, ...]
    ids: Tensor
    rows: Tensor
    columns: Tensor
    gold: Tensor


def collate(pairs: Sequence[TrainingPair], indices: Sequence[int], device: torch.device) -> Batch:
    """Raises ValueError for a pair without prompt or answer: it has nothing to predict."""
    ids: list[list[int]] = []
    rows: list[int] = []
    columns: list[int] = []
    gold: list[int] = []
    for row, index in enumerate(indices):
        pair = pairs[index]
        if not pair.prompt or not pair.answer:
            raise ValueError(f"pair {index} has an empty prompt or answer")
        ids.append([*pair.prompt, *pair.answer[:-1]])
        rows.extend([row] * len(pair.answer))
        columns.extend(range(len(pair.prompt) - 1, len(pair.prompt) - 1 + len(pair.answer)))
        gold.extend(pair.answer)
    picks = torch.tensor([rows, columns, gold], device=device)
    return Batch(tuple(indices), pad(ids, device), picks[0], picks[1], picks[2])


def answer_states(decoder: Decoder, prefix: Prefix | None, batch: Batch) -> Tensor:
    """Last hidden states [answer positions of the batch, hidden] behind `prefix`; differentiable in it."""
    return decoder.forward(decoder.embed(batch.ids), prefix)[batch.rows, batch.columns]


def epoch_batches(pairs: Sequence[TrainingPair], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Every pair once, in batches of similar length, in an order that (seed, epoch) alone decides."""
    rng = random.Random(f"{seed}:{epoch}")
    order = list(range(len(pairs)))
    rng.shuffle(order)
    window = batch_size * 8
    batches: list[list[int]] = []
    for start in range(0, len(order), window):
        near = sorted(order[start : start + window], key=lambda index: pairs[index].length)
        batches.extend(near[at : at + batch_size] for at in range(0, len(near), batch_size))
    rng.shuffle(batches)
    return batches


def batches_from(pairs: Sequence[TrainingPair], batch_size: int, seed: int, step: int) -> Iterator[list[int]]:
    """The endless run of batches from `step` on: what a resumed training goes on with."""
    epoch, offset = divmod(step, len(epoch_batches(pairs, batch_size, seed, 0)))
    while True:
        yield from epoch_batches(pairs, batch_size, seed, epoch)[offset:]
        epoch, offset = epoch + 1, 0
