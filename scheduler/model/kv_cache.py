"""The paged KV cache: per layer, keys and values as [num_blocks, kv_heads, block_size, head_dim]."""

from __future__ import annotations

import torch

from scheduler.model.staging import small_tensor


class KVCache:
    """Owns the memory; which block belongs to whom is the scheduler's knowledge.

    It starts uninitialised, so that pages nobody has written cost neither time nor memory; nothing reads a slot before
    it was written. With `scratch_block`, one more lies behind the last: rows that only fill up a batch write there.
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
    ) -> None:
        shape = (num_blocks + scratch_block, num_kv_heads, block_size, head_dim)
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.dtype = dtype
        self.device = device
        self.keys = [torch.empty(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self.values = [torch.empty(shape, dtype=dtype, device=device) for _ in range(num_layers)]

    @property
    def bytes_per_block(self) -> int:
        return 2 * len(self.keys) * self.keys[0][0].numel() * self.keys[0].element_size()

    def copy_blocks(self, copies: list[tuple[int, int]]) -> None:
        """Copy whole blocks, source to target, in every layer."""
        sources = small_tensor([source for source, _ in copies], self.device, torch.int64)
        targets = small_tensor([target for _, target in copies], self.device, torch.int64)
        for cache in (*self.keys, *self.values):
            cache[targets] = cache[sources]

    def write(self, blocks: list[int], keys: torch.Tensor, values: torch.Tensor) -> None:
        """Write `keys` and `values` [layers, n, kv_heads, head_dim] to positions 0 … n−1 of `blocks`."""
        positions = torch.arange(keys.shape[1], device=self.device)
        block = small_tensor(blocks, self.device, torch.int64)[positions // self.block_size]
        offset = positions % self.block_size
        keys, values = keys.to(self.device, self.dtype), values.to(self.device, self.dtype)
        for layer, (key_cache, value_cache) in enumerate(zip(self.keys, self.values, strict=True)):
            key_cache[block, :, offset] = keys[layer]
            value_cache[block, :, offset] = values[layer]
