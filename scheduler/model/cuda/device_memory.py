"""How much of a GPU's memory the KV cache may take, after weights and the largest step."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass

import torch


def is_shortage(error: BaseException) -> bool:
    """Whether the device is out of memory. torch's allocator raises a class of its own; the driver and cuBLAS raise a
    RuntimeError that says so."""
    told = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in told)
    )


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes: `free` after the weights are loaded, and `step`, the peak of the largest step."""

    total: int
    free: int
    step: int

    def left_for_cache(self, utilization: float) -> int:
        """Zero or less if nothing is left. The step counts twice, because graphs have working memory of their own."""
        spare = int(self.total * (1 - utilization))
        return self.free - spare - 2 * self.step

    def describe(self, utilization: float) -> str:
        """Says where the memory went, for a person who has to find more."""
        gib = [f"{size / 2**30:.1f}" for size in (self.total, self.total - self.free, self.step)]
        return (
            f"--gpu-memory-utilization {utilization:g} leaves {self.left_for_cache(utilization) / 2**30:.1f} GiB for "
            f"the KV cache (of {gib[0]} GiB, {gib[1]} are taken by weights and other processes, {gib[2]} by a step)"
        )


def peak_of(step: Callable[[], None], device: torch.device) -> int:
    """The peak of a step, run twice, because its first run compiles kernels. Raises torch.OutOfMemoryError."""
    step()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def memory_of(device: torch.device, step: int) -> DeviceMemory:
    """The memory as it is now, after torch has released what it caches."""
    gc.collect()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return DeviceMemory(total, free, step)
