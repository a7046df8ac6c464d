"""Decoding batches in a few sizes: padding rows fill them up, so that a graph captured for a size serves all below."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from scheduler.model.attention.plan import Planner
from scheduler.model.batch import RaggedBatch, Row, build_batch

LARGEST = 512  # beyond, launching kernels one by one no longer shows


def bucket_sizes(max_batch_size: int) -> tuple[int, ...]:
    """1, 2, 4, 8, then in steps that grow with the size, so that padding stays below a fifth of the larger batches."""
    most = min(max_batch_size, LARGEST)
    sizes = [1, 2, 4, 8, *range(16, 64, 8), *range(64, 256, 16), *range(256, LARGEST + 1, 32)]
    return (*(size for size in sizes if size < most), most)


@dataclass(frozen=True)
class BucketedBatches:
    """`BatchBuilder` that pads steps in which every row decodes to the next size.

    A padding row is a sequence of one token in the scratch block, which belongs to nobody: whatever it writes there
    is never read by anyone else.
    """

    sizes: tuple[int, ...]
    scratch_block: int
    block_size: int
    device: torch.device
    planner: Planner | None

    def __call__(self, rows: Sequence[Row]) -> RaggedBatch:
        size = next((size for size in self.sizes if size >= len(rows)), None)
        if size is None or not all(_decodes(row) for row in rows):
            return build_batch(rows, self.block_size, self.device, self.planner)
        padding = [self.padding_row] * (size - len(rows))
        return build_batch([*rows, *padding], self.block_size, self.device, self.planner, padded_from=len(rows))

    def empty(self, size: int) -> RaggedBatch:
        """A batch of padding rows alone."""
        return build_batch([self.padding_row] * size, self.block_size, self.device, self.planner, padded_from=0)

    @property
    def padding_row(self) -> Row:
        return Row(0, (0,), (self.scratch_block,), range(1))


def _decodes(row: Row) -> bool:
    return row.embeddings is None and len(row.token_ids) == 1 and len(row.logit_rows) == 1
