"""How much of a GPU's memory the KV cache may take: what weights and the largest step leave of it."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass

import torch


def is_shortage(error: BaseException) -> bool:
    """Whether the device has no memory left: torch's allocator has a class for it, the driver (a graph, a Triton
    kernel) and cuBLAS only say so."""
    told = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in told)
    )


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes; `free` is what nobody holds beside the weights, `step` what the largest step takes at its peak."""

    total: int
    free: int
    step: int

    def left_for_cache(self, utilization: float) -> int:
        """Zero or less where nothing is left. Steps are counted twice: graphs keep working memory of their own."""
        spare = int(self.total * (1 - utilization))
        return self.free - spare - 2 * self.step

    def describe(self, utilization: float) -> str:
        """Where the memory went, for whoever has to find more."""
        gib = [f"{size / 2**30:.1f}" for size in (self.total, self.total - self.free, self.step)]
        return (
            f"--gpu-memory-utilization {utilization:g} leaves {self.left_for_cache(utilization) / 2**30:.1f} GiB for "
            f"the KV cache (of {gib[0]} GiB, {gib[1]} are taken by weights and other processes, {gib[2]} by a step)"
        )


def peak_of(step: Callable[[], None], device: torch.device) -> int:
    """What a step takes at its peak, run twice: the first time kernels are compiled. Raises torch.OutOfMemoryError."""
    step()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def memory_of(device: torch.device, step: int) -> DeviceMemory:
    """As it is now, with what torch keeps for later given back."""
    gc.collect()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return DeviceMemory(total, free, step)
