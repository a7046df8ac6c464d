"""One step's rows as tensors: a ragged batch of shape (1, total_tokens)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from softbatch.scheduler.model.attention.backend import PagedBatch
from softbatch.scheduler.model.attention.tiles import AttentionPlan, Planner
from softbatch.scheduler.model.staging import to_device


@dataclass(frozen=True)
class Row:
    """`count` new positions from `start` on, of a sequence with these blocks.

    Positions turn as in a sequence of their own length, or of `turned_for` tokens if that is more.
    The input is `token_ids`, or `embeddings` [count, hidden] of a soft prompt that is being prefilled. `logit_rows` are
    the positions, counted from `start`, that need logits.
    """

    start: int
    token_ids: Sequence[int]
    block_table: Sequence[int]
    logit_rows: range
    embeddings: torch.Tensor | None = None
    decodes: bool = True  # if it is one token: it continues a text, and is no chunk of a prompt
    turned_for: int = 0

    @property
    def count(self) -> int:
        return len(self.token_ids) if self.embeddings is None else self.embeddings.shape[0]


@dataclass(frozen=True)
class RaggedBatch:
    """The T tokens of S rows, concatenated."""

    token_ids: torch.Tensor  # int64 [T], 0 for embeddings
    positions: torch.Tensor  # int64 [T]
    logit_rows: torch.Tensor  # int64 [R], row by row
    embeddings: tuple[tuple[int, torch.Tensor], ...]  # (first row, [count, hidden])
    attention: PagedBatch
    shape: BatchShape | None = None  # set if the batch is padded to this shape
    num_logits: int = 0  # without padding
    lengths: torch.Tensor | None = None  # int64 [T], of the sequences that positions turn as in; for models that ask


@dataclass(frozen=True)
class BatchShape:
    """The sizes of all arrays of padded batches, which share static memory. Only the block table's width differs."""

    tokens: int
    logits: int
    narrow_tiles: int
    wide_tiles: int
    is_decoding: bool  # one token per row

    def fill_up(self, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Pad the arrays with sequences without tokens and tiles without work. The number of tokens is right already.
        There may be as many sequences, and as many rows to merge, as tokens."""
        rules = {
            "logit_rows": (self.logits, 0),
            "query_start": (self.tokens + 1, self.tokens),
            "context_len": (self.tokens, 0),
            "block_table": (self.tokens, 0),
            "narrow": (self.narrow_tiles, -1),
            "merges": (self.tokens, 0),
            "wide": (self.wide_tiles, -1),
        }
        filled = dict(arrays)
        for name in rules.keys() & arrays.keys():
            length, value = rules[name]
            filled[name] = np.full((length, *arrays[name].shape[1:]), value, dtype=arrays[name].dtype)
            filled[name][: len(arrays[name])] = arrays[name]
        return filled


class BatchBuilder(Protocol):
    """Concatenates a step's rows into one batch on the device."""

    def __call__(self, rows: Sequence[Row]) -> RaggedBatch: ...


def _arrays(
    rows: Sequence[Row], block_size: int, by_length: bool
) -> tuple[dict[str, np.ndarray], list[tuple[int, torch.Tensor]]]:
    """What is copied to the device, by name; and the embeddings, each with its first row."""
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
    if by_length:
        arrays["lengths"] = np.maximum(positions + 1, np.array([row.turned_for for row in rows])[owner])
    return arrays, embeddings


def build_batch(
    rows: Sequence[Row],
    block_size: int,
    device: torch.device,
    planner: Planner | None = None,
    shape: BatchShape | None = None,
    joins_ranges: bool = True,
    by_length: bool = False,
) -> RaggedBatch:
    """Concatenate the rows. A planner adds the plan of the GPU's attention; a shape pads the batch. `joins_ranges` is
    for attention on CPUs, `by_length` for models whose positions turn by the length of a sequence."""
    arrays, embeddings = _arrays(rows, block_size, by_length)
    num_logits = len(arrays["logit_rows"])
    if planner is None and not all(row.decodes or row.count > 1 for row in rows):
        arrays["decodes"] = np.array([row.decodes for row in rows])
    has_parts = False
    if planner is not None:
        plan = planner.plan(np.diff(arrays["query_start"]), arrays["context_len"])
        arrays |= {"narrow": plan.narrow, "merges": plan.merges, "wide": plan.wide}
        has_parts = plan.has_parts or shape is not None
    if shape is not None:
        arrays = shape.fill_up(arrays)

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
            decodes=tensors.get("decodes"),
            joins_ranges=joins_ranges,
        ),
        shape=shape,
        num_logits=num_logits,
        lengths=tensors.get("lengths"),
    )
