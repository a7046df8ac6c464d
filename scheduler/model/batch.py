"""One step's rows as tensors: a ragged batch of shape (1, total_tokens)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from scheduler.model.attention.base import PagedBatch
from scheduler.model.attention.plan import AttentionPlan, Planner, padded
from scheduler.model.staging import to_device


@dataclass(frozen=True)
class Row:
    """`count` new positions from `start` on, of a sequence with these blocks.

    Its input is `token_ids`, or `embeddings` [count, hidden] where a soft prompt is being computed. `logit_rows` are
    the positions, counted from `start`, whose logits are wanted.
    """

    start: int
    token_ids: Sequence[int]
    block_table: Sequence[int]
    logit_rows: range
    embeddings: torch.Tensor | None = None

    @property
    def count(self) -> int:
        return len(self.token_ids) if self.embeddings is None else self.embeddings.shape[0]


@dataclass(frozen=True)
class RaggedBatch:
    """T tokens of S rows, one after another."""

    token_ids: torch.Tensor  # int64 [T], 0 where embeddings stand
    positions: torch.Tensor  # int64 [T]
    logit_rows: torch.Tensor  # int64 [R], row by row
    embeddings: tuple[tuple[int, torch.Tensor], ...]  # (first row, [count, hidden])
    attention: PagedBatch
    padded_from: int | None = None  # set where only so many rows are real, each of one decoding token


class BatchBuilder(Protocol):
    """Makes a step's rows one batch on the device."""

    def __call__(self, rows: Sequence[Row]) -> RaggedBatch: ...


def build_batch(
    rows: Sequence[Row],
    block_size: int,
    device: torch.device,
    planner: Planner | None = None,
    padded_from: int | None = None,
) -> RaggedBatch:
    """With a planner, the batch carries the plan of the GPU's attention; for padded rows one of a fixed size."""
    counts = np.array([row.count for row in rows])
    starts = np.array([row.start for row in rows])
    query_start = np.concatenate([[0], np.cumsum(counts)])
    total = int(query_start[-1])

    tables = np.zeros((len(rows), max(len(row.block_table) for row in rows)), dtype=np.int32)
    token_ids = np.zeros(total, dtype=np.int64)
    embeddings = []
    for index, row in enumerate(rows):
        tables[index, : len(row.block_table)] = row.block_table
        if row.embeddings is None:
            token_ids[query_start[index] : query_start[index + 1]] = row.token_ids
        else:
            embeddings.append((int(query_start[index]), row.embeddings))

    owner = np.repeat(np.arange(len(rows)), counts)
    positions = np.arange(total) - query_start[owner] + starts[owner]
    slots = tables[owner, positions // block_size].astype(np.int64) * block_size + positions % block_size
    logit_rows = [start + offset for row, start in zip(rows, query_start, strict=False) for offset in row.logit_rows]
    arrays = {
        "token_ids": token_ids,
        "positions": positions,
        "logit_rows": np.array(logit_rows, dtype=np.int64),
        "query_start": query_start.astype(np.int32),
        "context_len": (starts + counts).astype(np.int32),
        "slot_mapping": slots,
        "block_table": tables,
    }
    has_parts = False
    if planner is not None:
        plan = planner.plan(counts, starts + counts)
        narrow = plan.narrow if padded_from is None else padded(plan.narrow, planner.max_narrow_tiles(len(rows)))
        arrays |= {"narrow": narrow, "merges": plan.merges, "wide": plan.wide}
        has_parts = plan.has_parts or padded_from is not None

    tensors = to_device(arrays, device)
    return RaggedBatch(
        token_ids=tensors["token_ids"],
        positions=tensors["positions"],
        logit_rows=tensors["logit_rows"],
        embeddings=tuple(embeddings),
        attention=PagedBatch(
            query_start=tensors["query_start"],
            context_len=tensors["context_len"],
            block_table=tensors["block_table"],
            slot_mapping=tensors["slot_mapping"],
            plan=AttentionPlan(tensors["narrow"], tensors["merges"], tensors["wide"], has_parts) if planner else None,
        ),
        padded_from=padded_from,
    )
