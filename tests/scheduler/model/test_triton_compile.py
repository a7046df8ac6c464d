"""The kernels as a GPU would get them: compiled for an H100/H200 down to machine code, which needs no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
SHARED_MEMORY = 232_448  # bytes that one program may use on an H100 or H200
KERNELS = {"attend", "merge", "write_cache", "add_rms_norm", "rotate_and_write", "silu_and_multiply"}


CASES = [
    ("llama", 128, "bfloat16"),
    ("llama", 64, "bfloat16"),
    ("qwen3", 64, "float16"),
    ("llama", 96, "bfloat16"),
    ("llama", 256, "bfloat16"),
    ("qwen3", 128, "float32"),
    ("llama", 256, "float32"),
]
WINDOWS = ("windows", 128, "bfloat16")


def name_of(kind: str, head_dim: int, dtype: str) -> str:
    return f"{kind}-{head_dim}-{dtype}"


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process made of all cases: the kernels of each, or the error it ended with."""
    pytest.importorskip("triton", reason="needs Triton (in the dev extra)")
    cache = tmp_path_factory.mktemp("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.compile_kernels", *(name_of(*case) for case in [*CASES, WINDOWS])],
        cwd=ROOT,
        env=environment | {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_windows_softcaps_and_sinks_compile(outcomes: dict[str, Any]) -> None:
    kernels = outcomes[name_of(*WINDOWS)]
    assert isinstance(kernels, list), kernels
    assert {kernel["kernel"] for kernel in kernels} == {"attend", "merge", "write_cache"}
    for kernel in kernels:
        assert kernel["shared_bytes"] <= SHARED_MEMORY
        assert kernel["spill_bytes"] == 0, kernel
        assert kernel["kernel"] != "attend" or kernel["tensor_core_products"] > 0, kernel


@pytest.mark.parametrize(("kind", "head_dim", "dtype"), CASES)
def test_every_launch_of_a_step_compiles(outcomes: dict[str, Any], kind: str, head_dim: int, dtype: str) -> None:
    """Half precision without spilling registers, through tensor cores, its loads running ahead of its products."""
    kernels = outcomes[name_of(kind, head_dim, dtype)]
    assert isinstance(kernels, list), kernels
    assert {kernel["kernel"] for kernel in kernels} == KERNELS
    for kernel in kernels:
        assert kernel["cubin_bytes"] > 0
        assert kernel["shared_bytes"] <= SHARED_MEMORY
        if dtype != "float32":
            assert kernel["spill_bytes"] == 0, kernel
        if kernel["kernel"] == "attend":
            assert kernel["async_copies"] > 0
            # While one tile is computed the next is on its way: nobody waits for all copies.
            assert kernel["copies_in_flight"] > 0 or dtype == "float32", kernel
            assert (kernel["tensor_core_products"] > 0) == (dtype != "float32"), kernel
