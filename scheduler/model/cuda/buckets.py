"""Batches padded to a few shapes, so that a CUDA graph captured for a shape serves all smaller batches too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from softbatch.scheduler.model.attention.tiles import Planner
from softbatch.scheduler.model.batch import BatchShape, RaggedBatch, Row, build_batch

LARGEST_DECODING = 512
# Steps with prefill chunks. For larger ones, computing takes longer than launching kernels one by one.
MIXED = (16, 32, 64, 128, 192, 256, 384, 512, 768, 1024)


def decoding_sizes(max_batch_size: int) -> tuple[int, ...]:
    """The sizes of decoding batches. Their distance grows with the size, so that the share of padding stays small."""
    most = min(max_batch_size, LARGEST_DECODING)
    sizes = [1, 2, 4, 8, *range(16, 64, 8), *range(64, 256, 16), *range(256, LARGEST_DECODING + 1, 32)]
    return (*(size for size in sizes if size < most), most)


def mixed_sizes(max_batch_tokens: int) -> tuple[int, ...]:
    """The sizes of mixed batches, up to the largest step or the largest of the list."""
    sizes = tuple(size for size in MIXED if size < max_batch_tokens)
    return (*sizes, max_batch_tokens) if max_batch_tokens <= MIXED[-1] else sizes


@dataclass(frozen=True)
class BucketedBatches:
    """`BatchBuilder` that pads a step to the next shape, if every row decodes or the step is small.

    A padding row is a sequence of one token in the scratch block, which belongs to no sequence. A step that fits no
    shape, or has embeddings, is not padded.
    """

    decoding: tuple[int, ...]
    mixed: tuple[int, ...]
    max_logits: int
    scratch_block: int
    block_size: int
    device: torch.device
    planner: Planner | None
    by_length: bool = False

    @property
    def shapes(self) -> list[BatchShape]:
        """All shapes, the larger first."""
        shapes = [self._decoding_shape(size) for size in self.decoding] + [self._mixed_shape(s) for s in self.mixed]
        return sorted(shapes, key=lambda shape: -shape.tokens)

    def __call__(self, rows: Sequence[Row]) -> RaggedBatch:
        shape = self._shape_for(rows)
        if shape is None:
            return self._build(rows)
        padding = [self._padding_row] * (shape.tokens - sum(row.count for row in rows))
        return self._build([*rows, *padding], shape)

    def empty(self, shape: BatchShape) -> RaggedBatch:
        """A batch of padding rows only."""
        return self._build([self._padding_row] * shape.tokens, shape)

    def _build(self, rows: Sequence[Row], shape: BatchShape | None = None) -> RaggedBatch:
        return build_batch(rows, self.block_size, self.device, self.planner, shape, by_length=self.by_length)

    def _shape_for(self, rows: Sequence[Row]) -> BatchShape | None:
        tokens, logits = sum(row.count for row in rows), sum(len(row.logit_rows) for row in rows)
        decodes = tokens == logits == len(rows)
        size = next((size for size in (self.decoding if decodes else self.mixed) if size >= tokens), None)
        if size is None or any(row.embeddings is not None for row in rows):
            return None
        shape = self._decoding_shape(size) if decodes else self._mixed_shape(size)
        return shape if logits <= shape.logits else None

    def _decoding_shape(self, size: int) -> BatchShape:
        return BatchShape(size, size, self.planner.max_narrow_tiles(size) if self.planner else 0, 0, True)

    def _mixed_shape(self, size: int) -> BatchShape:
        narrow = self.planner.max_narrow_tiles(size) if self.planner else 0
        wide = self.planner.max_wide_tiles(size) if self.planner else 0
        return BatchShape(size, min(size, self.max_logits), narrow, wide, False)

    @property
    def _padding_row(self) -> Row:
        return Row(0, (0,), (self.scratch_block,), range(0))
