"""What a GPU or a compiler raises at the start is told in one line that says what to do, and nothing else is."""

from __future__ import annotations

import subprocess

import pytest
import torch

from softbatch.scheduler.model.cuda.failures import as_model_error
from softbatch.scheduler.model.source import ModelError

SHORT, TOOLS = "too little free memory", "python3-dev"
KNOWN: dict[str, tuple[Exception, str]] = {
    "torch's allocator": (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        SHORT,
    ),
    "the driver": (RuntimeError("Triton Error [CUDA]: out of memory"), SHORT),
    "cuBLAS": (
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"),
        SHORT,
    ),
    "no compiler": (
        RuntimeError("Failed to find C compiler. Please specify via CC."),
        TOOLS,
    ),
    "no headers": (subprocess.CalledProcessError(1, ["gcc", "-I/usr/include"]), TOOLS),
}


@pytest.mark.parametrize("name", KNOWN)
def test_known_failures(name: str) -> None:
    raised, words = KNOWN[name]
    with pytest.raises(ModelError) as told, as_model_error():
        raise raised
    assert words in str(told.value)
    assert "\n" not in str(told.value)


def test_a_kernel_that_asks_for_too_much() -> None:
    errors = pytest.importorskip("triton.runtime.errors", reason="needs Triton (in the dev extra)")
    with pytest.raises(ModelError, match="OutOfResources: out of resource: shared memory"), as_model_error():
        raise errors.OutOfResources(300_000, 232_448, "shared memory")


@pytest.mark.parametrize("error", [ModelError("--model x: no"), RuntimeError("no kernel image"), KeyError("x")])
def test_everything_else_passes(error: Exception) -> None:
    with pytest.raises(type(error)) as passed, as_model_error():
        raise error
    assert passed.value is error
