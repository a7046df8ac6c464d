"""The paged KV cache: per layer, keys and values as [num_blocks, kv_heads, block_size, head_dim or bytes]."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from softbatch.scheduler.model.cpu import ops
from softbatch.scheduler.model.cpu.formats import KvFormat
from softbatch.scheduler.model.key_offsets import KeyOffsets
from softbatch.scheduler.model.staging import small_tensor


@dataclass(frozen=True)
class RowFormat:
    """How the cache stores one head's key or value of one token: as `dtype`, or packed by the CPU kernels.

    Packed keys are rotated, so only kernels that rotate queries alike can read them.
    """

    dtype: torch.dtype
    head_dim: int
    kv_format: KvFormat = KvFormat.PLAIN

    @property
    def stored_as(self) -> torch.dtype:
        return self.dtype if self.kv_format is KvFormat.PLAIN else torch.uint8

    @property
    def sizes(self) -> tuple[int, int]:
        """Entries of `stored_as` of a key and of a value. Raises RuntimeError for heads that cannot be packed."""
        if self.kv_format is KvFormat.PLAIN:
            return self.head_dim, self.head_dim
        return ops.packed_row_bytes(self.kv_format, self.head_dim)

    @property
    def bytes_per_token(self) -> int:
        """Of one head's key and value."""
        return sum(self.sizes) * self.stored_as.itemsize

    def rows(self, numbers: torch.Tensor, *, are_keys: bool) -> torch.Tensor:
        """[…, head_dim] as they are stored, though not yet rounded to `dtype` where they are not packed."""
        if self.kv_format is KvFormat.PLAIN:
            return numbers
        return ops.pack_rows(numbers.float(), self.kv_format, are_keys)


@dataclass(frozen=True, eq=False)
class StagedBlocks:
    """A soft prompt's keys and values as the cache stores them: [layers, blocks, kv_heads, block_size, entries]."""

    keys: torch.Tensor
    values: torch.Tensor


class KVCache:
    """Owns the memory of all blocks; the scheduler knows which block belongs to which sequence.

    The memory is zeroed at the start, so that the operating system provides its pages then and not in the middle of a
    step. `scratch_block` adds one block behind the last, which padding rows write to.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_blocks: int,
        num_kv_heads: int,
        block_size: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        scratch_block: bool = False,
        kv_format: KvFormat = KvFormat.PLAIN,
        key_offsets: KeyOffsets | None = None,
    ) -> None:
        """`key_offsets` are what keys lack in a packed cache."""
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.dtype = dtype
        self.device = device
        self.format = RowFormat(dtype, head_dim, kv_format)
        self.key_offsets = None if kv_format is KvFormat.PLAIN else key_offsets
        shape = (num_layers, num_blocks + scratch_block, num_kv_heads, block_size)
        self._keys, self._values = (
            torch.zeros((*shape, size), dtype=self.format.stored_as, device=device) for size in self.format.sizes
        )
        self.keys: list[torch.Tensor] = list(self._keys)
        self.values: list[torch.Tensor] = list(self._values)

    def describe(self) -> str:
        packed = "" if self.format.kv_format is KvFormat.PLAIN else f", packed as {self.format.kv_format}"
        return f"{self.num_blocks} blocks of {self.block_size} tokens{packed}"

    @property
    def bytes_per_block(self) -> int:
        return len(self.keys) * (self.keys[0][0].nbytes + self.values[0][0].nbytes)

    def copy_blocks(self, copies: list[tuple[int, int]]) -> None:
        """Copy whole blocks, source to target, in every layer."""
        sources = small_tensor([source for source, _ in copies], self.device, torch.int64)
        targets = small_tensor([target for _, target in copies], self.device, torch.int64)
        for cache in (*self.keys, *self.values):  # layer by layer: a copy needs its size in memory once more
            cache[targets] = cache[sources]

    def stage(self, keys: torch.Tensor, values: torch.Tensor) -> StagedBlocks:
        """`keys` and `values` [layers, n, kv_heads, head_dim] as blocks on the host, the last padded with zeros.

        Thread-safe, for it touches no block of the cache. For a GPU the blocks are pinned, so that `write` need not
        wait."""
        if self.key_offsets is not None:
            keys = keys.float() - self.key_offsets.turned(keys.shape[1])
        return StagedBlocks(
            self._in_blocks(self.format.rows(keys, are_keys=True)),
            self._in_blocks(self.format.rows(values, are_keys=False)),
        )

    def write(self, blocks: list[int], staged: StagedBlocks) -> None:
        """Copy staged blocks to `blocks`."""
        both = ((self._keys, staged.keys), (self._values, staged.values))
        if self.device.type == "cpu":  # by numpy, which stays in this thread
            for memory, rows in both:
                memory.view(torch.uint8).numpy()[:, blocks] = rows.view(torch.uint8).numpy()
            return
        targets = small_tensor(blocks, self.device, torch.int64)
        for memory, rows in both:
            memory[:, targets] = rows.to(self.device, non_blocking=True)

    def _in_blocks(self, rows: torch.Tensor) -> torch.Tensor:
        layers, length, kv_heads, size = rows.shape
        blocks = -(-length // self.block_size)
        padded = (layers, blocks * self.block_size, kv_heads, size)
        staged = torch.zeros(padded, dtype=self.format.stored_as, pin_memory=self.device.type == "cuda")
        staged[:, :length] = rows
        return staged.view(layers, blocks, self.block_size, kv_heads, size).transpose(2, 3)
