"""Where the Triton kernels are tested: on the GPU, or else on the CPU under Triton's interpreter."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import torch

DEVICES = ["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)]


def prepare(name: str) -> torch.device:
    """The device that a kernel may be launched on from now on; skips the test where that is not here."""
    pytest.importorskip("triton", reason="needs Triton (in the dev extra)")
    if name == "cuda":
        return torch.device("cuda")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("the same test runs on the GPU")
    _teach_bfloat16()
    return torch.device("cpu")


def _teach_bfloat16() -> None:
    """The interpreter keeps bfloat16 as its 16 bits, and multiplies matrices of those as if they were integers."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    original = builder.create_dot
    if getattr(original, "knows_bfloat16", False):
        return

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        wide = (handle.data.astype(np.uint32) << 16).view(np.float32)
        return interpreter.TensorHandle(wide, tl.float32)

    def create_dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, imprecise: Any) -> Any:
        return original(self, widened(a), widened(b), d, input_precision, imprecise)

    create_dot.knows_bfloat16 = True  # type: ignore[attr-defined]
    builder.create_dot = create_dot
