"""One step's rows as tensors: a ragged batch of shape (1, total_tokens)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from scheduler.model.attention.base import PagedBatch


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


def build_batch(rows: Sequence[Row], block_size: int, device: torch.device) -> RaggedBatch:
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

    def tensor(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(device)

    return RaggedBatch(
        token_ids=tensor(token_ids),
        positions=tensor(positions),
        logit_rows=tensor(np.array(logit_rows, dtype=np.int64)),
        embeddings=tuple(embeddings),
        attention=PagedBatch(
            query_start=tensor(query_start.astype(np.int32)),
            context_len=tensor((starts + counts).astype(np.int32)),
            block_table=tensor(tables),
            slot_mapping=tensor(slots),
        ),
    )
