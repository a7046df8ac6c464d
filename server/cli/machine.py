"""What a machine has: processor, threads, memory, GPU; and whether that is good for serving."""

from __future__ import annotations

import contextlib
import os
import shutil
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import psutil
import torch

from softbatch.scheduler.model.kv_cache_sizing import CPU_KV_CACHE_GIB

GIB = 2**30
# Of x86-64, in the order of their worth to the kernels: what /proc/cpuinfo calls them, and what they are for.
INSTRUCTION_SETS = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx512_vnni": "VNNI",
    "avx512_bf16": "AVX-512 BF16",
    "amx_bf16": "AMX",
}


class State(StrEnum):
    """How much a finding matters."""

    GOOD = "good"
    SLOW = "slow"
    BROKEN = "broken"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; `advice` says what to do if it is not good."""

    about: str
    found: str
    state: State = State.GOOD
    advice: str = ""


def processor() -> Finding:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    flags = set(fields.get("flags", fields.get("Features", "")).split())
    found = [title for flag, title in INSTRUCTION_SETS.items() if flag in flags]
    name = fields.get("model name", "unknown")
    if "avx2" not in flags:
        advice = "the kernels are written for AVX2 and above; here they are plain C++, several times slower"
        return Finding("processor", f"{name}: no AVX2", State.SLOW, advice)
    return Finding("processor", f"{name}: {', '.join(found)}")


def threads() -> Finding:
    usable, allowed = len(os.sched_getaffinity(0)), _cgroup_cores()
    threads = torch.get_num_threads()
    found = f"{threads} for {usable} usable processors"
    if allowed is not None and allowed < threads:
        advice = f"this container may use {allowed:g} processors: set OMP_NUM_THREADS={max(1, int(allowed))}"
        return Finding("threads", found, State.SLOW, advice)
    if threads < usable // 2:
        return Finding("threads", found, State.SLOW, "OMP_NUM_THREADS leaves processors unused")
    return Finding("threads", found)


def _cgroup_cores() -> float | None:
    """What the container's quota comes to, in processors; None without one."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return None
    return None if quota == "max" else int(quota) / int(period)


def memory() -> Finding:
    free = psutil.virtual_memory().available
    with contextlib.suppress(OSError, ValueError):  # no limit
        limit, used = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current"))
        free = min(free, limit - used)
    found = f"{free / GIB:.1f} GiB free"
    if free < (CPU_KV_CACHE_GIB + 1) * GIB:
        advice = f"the KV cache takes {CPU_KV_CACHE_GIB:g} GiB by default: lower --kv-cache-gib, or free memory"
        return Finding("memory", found, State.SLOW, advice)
    return Finding("memory", found)


def gpu() -> Finding:
    if torch.cuda.is_available():
        name, (free, total) = torch.cuda.get_device_name(), torch.cuda.mem_get_info()
        return Finding("GPU", f"{name}: {free / GIB:.0f} of {total / GIB:.0f} GiB free")
    if shutil.which("nvidia-smi"):
        advice = "PyTorch here is a build without CUDA, or too new for the driver: install one that fits the driver"
        return Finding("GPU", "an NVIDIA driver, but PyTorch finds no device", State.SLOW, advice)
    return Finding("GPU", "none: models run on the processor")
