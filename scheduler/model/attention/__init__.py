"""Paged attention behind one signature; `choose` picks the fastest backend that runs here."""

from __future__ import annotations

import torch

from softbatch.scheduler.model.attention import cpu
from softbatch.scheduler.model.attention import triton as cuda
from softbatch.scheduler.model.attention.backend import AttentionBackend
from softbatch.scheduler.model.attention.reference import reference


def choose(device: torch.device, dtype: torch.dtype) -> tuple[str, AttentionBackend]:
    """The backend for this device and cache dtype, and its name. Compiles the CPU kernel at the first start."""
    if device.type == "cpu" and dtype in cpu.DTYPES:
        kernel = cpu.build()
        if kernel is not None:
            return "cpu", kernel
    if device.type == "cuda" and dtype in cuda.DTYPES:
        triton = cuda.build(device)
        if triton is not None:
            return "triton", triton
    return "reference", reference
