"""The paged KV cache: per layer, keys and values as [num_blocks, kv_heads, block_size, head_dim]."""

from __future__ import annotations

import torch

from scheduler.model.staging import small_tensor


class KVCache:
    """Owns the memory; which block belongs to whom is the scheduler's knowledge.

    It is zeroed, so that its pages are there before the first request: on a virtual machine, asking for two more
    megabytes amid a step can hold that up for four milliseconds. With `scratch_block`, one more lies behind the last:
    rows that only fill up a batch write there.
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
        shape = (2, num_layers, num_blocks + scratch_block, num_kv_heads, block_size, head_dim)
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.dtype = dtype
        self.device = device
        self._memory = torch.zeros(shape, dtype=dtype, device=device)
        self.keys: list[torch.Tensor] = list(self._memory[0])
        self.values: list[torch.Tensor] = list(self._memory[1])

    @property
    def bytes_per_block(self) -> int:
        return 2 * len(self.keys) * self.keys[0][0].numel() * self.keys[0].element_size()

    def copy_blocks(self, copies: list[tuple[int, int]]) -> None:
        """Copy whole blocks, source to target, in every layer."""
        sources = small_tensor([source for source, _ in copies], self.device, torch.int64)
        targets = small_tensor([target for _, target in copies], self.device, torch.int64)
        for cache in (*self.keys, *self.values):  # not all at once: what is copied lies in memory a second time
            cache[targets] = cache[sources]

    def stage(self, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """`keys` and `values` [layers, n, kv_heads, head_dim] as blocks on the host, the last filled up with zeros:
        [2, layers, blocks, kv_heads, block_size, head_dim]. Touches no block of the cache: any thread may call it.
        For a GPU they lie in pinned memory, so that `write` waits for nothing."""
        layers, length, kv_heads, head_dim = keys.shape
        blocks = -(-length // self.block_size)
        padded = (2, layers, blocks * self.block_size, kv_heads, head_dim)
        staged: torch.Tensor = torch.zeros(padded, dtype=self.dtype, pin_memory=self.device.type == "cuda")
        staged[0, :, :length], staged[1, :, :length] = keys, values
        return staged.view(2, layers, blocks, self.block_size, kv_heads, head_dim).transpose(3, 4)

    def write(self, blocks: list[int], staged: torch.Tensor) -> None:
        """Write what `stage` made to `blocks`."""
        if self.device.type == "cpu":  # by numpy, which stays in this thread
            self._memory.view(torch.uint8).numpy()[:, :, blocks] = staged.view(torch.uint8).numpy()
            return
        targets = small_tensor(blocks, self.device, torch.int64)
        self._memory[:, :, targets] = staged.to(self.device, non_blocking=True)
