"""The plan of a step's attention: which Triton program computes what. Made once per step, on the host."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

LEAST_KEYS = 64  # with fewer, merging a part costs more than it gains
_TABLE_BYTES = 2048  # of shared memory, beside queries, keys and values
MIN_DOT = 16  # the smallest rows, columns and depth of a matrix product in Triton


@dataclass(frozen=True)
class TileShape:
    """Compile-time sizes of one launch of the attention kernel."""

    block_m: int  # query rows times the heads of a group
    block_n: int  # keys
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class PlanArrays:
    """The plan as host arrays, int32, with the columns that `triton_kernels` names.

    A `narrow` tile covers all or a part of its sequence's keys; `merges` names the parts that belong together. A `wide`
    tile covers all keys that its rows see.
    """

    narrow: np.ndarray  # [n, 4]
    merges: np.ndarray  # [query rows of narrow sequences, 4]
    wide: np.ndarray  # [w, 4]

    @property
    def has_parts(self) -> bool:
        return bool(len(self.merges)) and int(self.merges[:, 2].max()) > 1


@dataclass(frozen=True)
class AttentionPlan:
    """`PlanArrays` on the device."""

    narrow: torch.Tensor
    merges: torch.Tensor
    wide: torch.Tensor
    has_parts: bool


@dataclass(frozen=True)
class Planner:
    """Splits a step into tiles, for a model with `group` query heads per KV head.

    A sequence with few query rows, such as a decoding one, would keep few multiprocessors busy. Its keys are therefore
    split into parts, about `programs` in a step (flash decoding). A sequence with many rows is split by rows.
    """

    group: int
    kv_heads: int
    narrow: TileShape
    wide: TileShape
    programs: int

    def max_narrow_tiles(self, sequences: int) -> int:
        """The most tiles that a plan for this many narrow sequences can have."""
        return self._budget + sequences

    def max_wide_tiles(self, tokens: int) -> int:
        """The most tiles that a plan for this many query rows can have."""
        least = self.narrow.block_m // self.group + 1
        return tokens // (self.wide.block_m // self.group) + tokens // least

    def plan(self, counts: np.ndarray, contexts: np.ndarray) -> PlanArrays:
        """The plan for sequences with `counts` new tokens (query rows) of `contexts` tokens in all."""
        counts, contexts = counts.astype(np.int64), contexts.astype(np.int64)
        starts = np.cumsum(counts) - counts
        is_narrow = counts * self.group <= self.narrow.block_m
        narrow = np.flatnonzero(is_narrow & (counts > 0))
        tiles, first, parts = self._narrow_tiles(narrow, contexts[narrow])
        owner, local = _spread(counts[narrow])
        merges = np.stack([starts[narrow][owner] + local, first[owner], parts[owner], local], axis=1)
        wide = np.flatnonzero(~is_narrow)
        return PlanArrays(
            tiles.astype(np.int32), merges.astype(np.int32), self._wide_tiles(wide, counts, contexts).astype(np.int32)
        )

    @property
    def _budget(self) -> int:
        return max(1, self.programs // self.kv_heads)

    def _narrow_tiles(self, sequences: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The tiles, and the first tile and number of tiles of each sequence."""
        step = max(LEAST_KEYS, self.narrow.block_n)
        chunk = max(step, _ceil(int(keys.sum()), self._budget))
        parts = np.maximum(1, _ceil(keys, chunk))
        size = np.maximum(step, _ceil(_ceil(keys, parts), step) * step)
        parts = _ceil(keys, size)
        first = np.cumsum(parts) - parts
        owner, index = _spread(parts)
        start = index * size[owner]
        end = np.minimum(start + size[owner], keys[owner])
        return np.stack([sequences[owner], np.zeros_like(start), start, end], axis=1), first, parts

    def _wide_tiles(self, sequences: np.ndarray, counts: np.ndarray, contexts: np.ndarray) -> np.ndarray:
        """The tiles, the longest first, so that no long one runs alone at the end."""
        rows = self.wide.block_m // self.group
        owner, index = _spread(_ceil(counts[sequences], rows))
        sequence = sequences[owner]
        first_row = index * rows
        end = contexts[sequence] - counts[sequence] + np.minimum(first_row + rows, counts[sequence])
        tiles = np.stack([sequence, first_row, np.zeros_like(end), end], axis=1)
        return tiles[np.argsort(-end, kind="stable")]


def make_planner(
    *, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, multiprocessors: int, shared_memory: int
) -> Planner:
    """The tile shapes for a model's attention on a GPU with `shared_memory` bytes per program.

    Keys are loaded through the block table, so that each load waits for another load. Triton therefore needs five
    pipeline stages to load a tile while the tile before is computed; with three, loads and products alternate.
    """
    group = heads // kv_heads
    least_m = max(MIN_DOT, next_power_of_two(group))
    block_d = max(MIN_DOT, next_power_of_two(head_dim))
    if dtype == torch.float32:  # exact products run outside the tensor cores and hold their operands in registers
        size = 32 if block_d <= 64 else 16
        narrow = [TileShape(least_m, size, 4, 3), TileShape(least_m, size, 4, 1)]
        wide = [TileShape(max(least_m, size), size, 4, 3), TileShape(max(least_m, size), size, 4, 1)]
    else:
        # The size of a tile lets four programs load on one multiprocessor at once.
        size = min(64, max(MIN_DOT, 4096 // block_d))
        narrow = [TileShape(least_m, size, 4, stages) for stages in (5, 3, 1)]
        rows, warps = max(least_m, 128), 4 if block_d <= 64 else 8
        keys = 64 if block_d <= 128 else 32
        wide = [TileShape(rows, keys, warps, stages) for stages in (5, 3)]
        wide += [TileShape(max(least_m, 64), 32, 4, stages) for stages in (3, 1)]

    def fitting(shapes: list[TileShape]) -> TileShape:
        for shape in shapes:
            rows = shape.block_m + (shape.num_stages + 1) * shape.block_n  # of queries, keys and values
            if rows * block_d * dtype.itemsize + _TABLE_BYTES <= shared_memory:
                return shape
        return shapes[-1]

    return Planner(
        group=group, kv_heads=kv_heads, narrow=fitting(narrow), wide=fitting(wide), programs=4 * multiprocessors
    )


def next_power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _ceil(number: Any, divisor: Any) -> Any:
    """number ÷ divisor, rounded up, for ints and arrays."""
    return -(-number // divisor)


def _spread(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each of sum(counts) items: the index of its owner, and its index within the owner."""
    owner = np.repeat(np.arange(len(counts)), counts)
    first = np.cumsum(counts) - counts
    return owner, np.arange(len(owner)) - first[owner]
