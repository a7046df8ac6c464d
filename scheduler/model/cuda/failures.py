"""Errors of a GPU, its driver or a compiler while a model is loaded, as one line that says what to do."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from softbatch.scheduler.model.cuda.device_memory import is_shortage
from softbatch.scheduler.model.source import ModelError


@contextmanager
def as_model_error() -> Iterator[None]:
    """Turns what is known into ModelError; everything else passes."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        message = _message(error)
        if message is None:
            raise
        raise ModelError(message) from error


def _message(error: Exception) -> str | None:
    first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if is_shortage(error):
        return (
            "the GPU has too little free memory for the model, its KV cache and a step: lower --kv-cache-gib, "
            "--gpu-memory-utilization or --max-batch-tokens, or free memory"
        )
    if isinstance(error, subprocess.CalledProcessError) or "Failed to find C compiler" in first_line:
        return (
            "the GPU kernels' launchers cannot be compiled: Triton needs a C compiler and Python's headers (Debian, "
            "Ubuntu: gcc and python3-dev; Fedora: gcc and python3-devel)"
        )
    errors = sys.modules.get("triton.errors")  # nobody else has imported it, nobody has raised one of its errors
    if errors is not None and isinstance(error, errors.TritonError):
        return f"the GPU kernels do not run on this GPU with this Triton ({type(error).__name__}: {first_line})"
    return None
