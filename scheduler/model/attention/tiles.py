"""Which Triton program computes what in a step: worked out once per step on the host, not once per layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

LEAST_KEYS = 64  # a part with fewer is not worth its merging
_TABLE_BYTES = 2048  # of shared memory, for what is not queries, keys or values
MIN_DOT = 16  # the least rows, columns and depth of a matrix product in Triton


@dataclass(frozen=True)
class TileShape:
    """Compile-time sizes of one launch of the attention kernel."""

    block_m: int  # query rows times the heads of a group
    block_n: int  # keys
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class PlanArrays:
    """The plan as host arrays, int32; see `triton_kernels` for their columns.

    `narrow` tiles may cover a part of their sequence's keys, `merges` says which parts belong together; `wide` ones
    always cover all that their rows see.
    """

    narrow: np.ndarray  # [n, 4]
    merges: np.ndarray  # [query rows of narrow sequences, 4]
    wide: np.ndarray  # [w, 4]

    @property
    def has_parts(self) -> bool:
        return bool(len(self.merges)) and int(self.merges[:, 2].max()) > 1


@dataclass(frozen=True)
class AttentionPlan:
    """The same on the device."""

    narrow: torch.Tensor
    merges: torch.Tensor
    wide: torch.Tensor
    has_parts: bool


@dataclass(frozen=True)
class Planner:
    """Splits a step into tiles for one model's attention: `group` query heads to each of `kv_heads`.

    Sequences with few query rows (decoding ones above all) would fill few multiprocessors: their keys are split into
    about as many parts as keep `programs` programs busy (flash decoding). Long ones are cut into query tiles.
    """

    group: int
    kv_heads: int
    narrow: TileShape
    wide: TileShape
    programs: int

    def max_narrow_tiles(self, sequences: int) -> int:
        """No plan for that many sequences, all narrow, has more tiles."""
        return self._budget + sequences

    def max_wide_tiles(self, tokens: int) -> int:
        """No plan for that many query rows has more."""
        least = self.narrow.block_m // self.group + 1
        return tokens // (self.wide.block_m // self.group) + tokens // least

    def plan(self, counts: np.ndarray, contexts: np.ndarray) -> PlanArrays:
        """For sequences with `counts` new tokens (query rows) of `contexts` tokens in all."""
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
        """The tiles, and each sequence's first tile and number of tiles."""
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
        """The longest first, so that no long one is left running alone at the end."""
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
    """The tile shapes that suit a model's attention and a GPU with `shared_memory` bytes for one program.

    Keys are loaded through the block table, so that a load waits for another load. Triton then needs five stages to let
    a tile's loads run while the tile before is computed; with three they only take turns.
    """
    group = heads // kv_heads
    least_m = max(MIN_DOT, next_power_of_two(group))
    block_d = max(MIN_DOT, next_power_of_two(head_dim))
    if dtype == torch.float32:  # exact products run outside the tensor cores and hold their operands in registers
        size = 32 if block_d <= 64 else 16
        narrow = [TileShape(least_m, size, 4, 3), TileShape(least_m, size, 4, 1)]
        wide = [TileShape(max(least_m, size), size, 4, 3), TileShape(max(least_m, size), size, 4, 1)]
    else:
        # As many bytes a tile as let four programs run on a multiprocessor, all loading.
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
    """number ÷ divisor, rounded up; of ints or arrays."""
    return -(-number // divisor)


def _spread(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each of sum(counts) items: whose it is, and which of that owner's."""
    owner = np.repeat(np.arange(len(counts)), counts)
    first = np.cumsum(counts) - counts
    return owner, np.arange(len(owner)) - first[owner]
