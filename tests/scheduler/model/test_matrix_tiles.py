"""Intel's matrix tiles: where Linux refuses them, the same build computes without, and the same tests hold."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.servers import PROJECT

TESTS = ("tests/scheduler/model/test_decoder.py", "tests/scheduler/model/test_attention.py::test_ragged_batches")

# A seccomp filter (BPF) that answers arch_prctl(ARCH_REQ_XCOMP_PERM, …) with EPERM and allows everything else.
REFUSE = """
import ctypes, struct, sys

ARCH_PRCTL, REQUEST, EPERM = 158, 0x1023, 1
LOAD, EQUAL, RETURN, ALLOW, ERROR = 0x20, 0x15, 0x06, 0x7FFF0000, 0x00050000
steps = [(LOAD, 0, 0, 0), (EQUAL, 0, 3, ARCH_PRCTL), (LOAD, 0, 0, 16), (EQUAL, 0, 1, REQUEST),
         (RETURN, 0, 0, ERROR | EPERM), (RETURN, 0, 0, ALLOW)]
code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(steps), ctypes.addressof(code)))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, program) == 0, ctypes.get_errno()
assert libc.syscall(ARCH_PRCTL, REQUEST, 18) == -1 and ctypes.get_errno() == EPERM
"""
LOGITS = """
import torch
from softbatch.scheduler.engine.engine import build_engine
from softbatch.scheduler.protocol import EngineConfig
from softbatch.scheduler.model.batch import Row

engine, _ = build_engine(EngineConfig(model="smollm2-135m", dtype="bfloat16", kv_cache_gib=0.01), lambda *_: None)
logits = engine._runner.forward([Row(0, list(range(300, 340)), list(range(4)), range(40))])
sys.stdout.write(logits.numpy().tobytes().hex())
"""


def has_tiles() -> bool:
    """The processor has them, Linux lets them be used, and the compiler knows them."""
    cpuinfo = Path("/proc/cpuinfo")
    if platform.machine() != "x86_64" or not cpuinfo.exists() or " amx_bf16 " not in cpuinfo.read_text():
        return False
    macros = subprocess.run(
        ["c++", "-march=native", "-dM", "-E", "-x", "c++", "/dev/null"], capture_output=True, text=True, check=False
    )
    allowed = run("import ctypes\nsys.exit(ctypes.CDLL(None).syscall(158, 0x1023, 18) != 0)").returncode == 0
    return allowed and "__AMX_BF16__" in macros.stdout


def run(program: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "import sys\n" + program]
    return subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)


@pytest.mark.skipif(shutil.which("c++") is None or not has_tiles(), reason="there are no matrix tiles here")
class TestWithoutPermission:
    def test_kernels_agree_with_the_reference(self) -> None:
        arguments = [*TESTS, "-q", "-x", "-p", "no:cacheprovider", "-k", "bfloat16 or bf16 or 12_bits"]
        done = run(f"{REFUSE}\nimport pytest\nsys.exit(pytest.main({arguments!r}))")
        assert done.returncode == 0, done.stdout + done.stderr

    def test_the_way_that_is_taken_is_another(self) -> None:
        """Sums are rounded otherwise, so the two can be told apart; and both are near those of float32."""
        import torch

        programs = (LOGITS, REFUSE + LOGITS, LOGITS.replace('"bfloat16"', '"float32"'))
        done = [run(program) for program in programs]
        assert [one.returncode for one in done] == [0, 0, 0], "".join(one.stderr for one in done)
        first, second, exact = (torch.frombuffer(bytearray.fromhex(one.stdout), dtype=torch.float32) for one in done)
        assert not torch.equal(first, second)
        for rounded in (first, second):
            assert (rounded - exact).norm() < 0.02 * (exact - exact.mean()).norm()
