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
    _patch_once()
    return torch.device("cpu")


class _Patched:
    """Of Triton's language, which stays as it is between launches."""

    def restore(self) -> None:
        pass


def _patch_once() -> None:
    """The interpreter patches the language again for each launch, and for each function that a kernel calls, which
    takes longer than what it runs. In a process that interprets all kernels, once is enough."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang
    if getattr(patch, "is_once", False):
        return
    patched: set[Any] = set()

    def patch_lang(function: Any) -> _Patched:
        if function not in patched:
            patch(function)
            patched.add(function)
        return _Patched()

    patch_lang.is_once = True  # type: ignore[attr-defined]
    interpreter._patch_lang = patch_lang


def _teach_bfloat16() -> None:
    """The interpreter keeps bfloat16 as its 16 bits, multiplies matrices of those as if they were integers, and cuts
    bits off where a GPU rounds to the nearest: both are put right."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    original_dot, original_cast = builder.create_dot, builder.cast_impl
    if getattr(original_dot, "knows_bfloat16", False):
        return

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        wide = (handle.data.astype(np.uint32) << 16).view(np.float32)
        return interpreter.TensorHandle(wide, tl.float32)

    def create_dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, imprecise: Any) -> Any:
        return original_dot(self, widened(a), widened(b), d, input_precision, imprecise)

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        if (source.dtype.scalar, target.scalar) == (tl.bfloat16, tl.float32):
            return widened(source)
        if (source.dtype.scalar, target.scalar) == (tl.float32, tl.bfloat16):
            bits = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16().view(torch.int16).numpy()
            return interpreter.TensorHandle(bits.view(np.uint16).reshape(source.data.shape), tl.bfloat16)
        return original_cast(self, source, target)

    create_dot.knows_bfloat16 = True  # type: ignore[attr-defined]
    builder.create_dot, builder.cast_impl = create_dot, cast_impl
