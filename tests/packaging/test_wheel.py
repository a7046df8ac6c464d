"""What setup.py puts into a wheel. That such a wheel serves without a compiler is shown by `make wheel-check`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from dataclasses import asdict
from pathlib import Path

import torch

from softbatch.scheduler.model.cpu.prebuilt import Key
from tests.support.servers import PROJECT

TORCH = torch.__version__.partition("+")[0]
FOLDER = "softbatch/scheduler/model/cpu/prebuilt/"


ON_ARM = "import platform, runpy; platform.machine = lambda: 'aarch64'; runpy.run_path('setup.py')"


def build(kernels: str, directory: Path, *script: str) -> subprocess.CompletedProcess[str]:
    """Outside the project's folder. The compiler does not compile, which would take minutes: it leaves empty files."""
    compiler = directory / "c++"
    compiler.write_text('#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done; touch "$2"\n')
    compiler.chmod(0o755)
    command = [sys.executable, *(script or ("setup.py",)), "--quiet", "egg_info", "--egg-base", directory, "build"]
    command += ["--build-base", directory / "build", "--build-lib", directory / "lib"]
    command += ["bdist_wheel", "--bdist-dir", directory / "bdist"]
    command += ["--dist-dir", directory / "dist"]
    environment = os.environ | {"SOFTBATCH_KERNELS": kernels, "CXX": str(compiler), "PYTHONWARNINGS": "ignore"}
    return subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True, check=False)


def test_a_wheel_holds_the_kernels_it_was_built_with_and_says_for_what(tmp_path: Path) -> None:
    """And none of an earlier build in the same directory, which other sources may have made."""
    earlier = tmp_path / "lib" / FOLDER / "amx.so"
    earlier.parent.mkdir(parents=True)
    earlier.touch()
    done = build("avx2", tmp_path)
    assert done.returncode == 0, done.stderr
    (wheel,) = (tmp_path / "dist").iterdir()
    assert wheel.name.startswith("softbatch-")
    assert "-py3-none-linux_" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        inside = {name.removeprefix(FOLDER) for name in archive.namelist() if name.startswith(FOLDER)}
        assert inside == {"avx2.so", "manifest.json"}
        key = Key(**json.loads(archive.read(f"{FOLDER}manifest.json")))
        (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        required = archive.read(metadata).decode()
    assert asdict(key) == asdict(Key.of(torch.__version__, torch.compiled_with_cxx11_abi()))
    assert f"Requires-Dist: torch=={TORCH}\n" in required
    assert "Requires-Dist: torch>=" not in required


def test_a_machine_that_no_kernels_are_for_gets_a_wheel_without_any(tmp_path: Path) -> None:
    """The image is built for arm64 too, and its file asks for all kernels."""
    done = build("all", tmp_path, "-c", ON_ARM)
    assert done.returncode == 0, done.stderr
    assert "no kernels are compiled ahead: they are for x86_64, and this is aarch64" in done.stdout
    (wheel,) = (tmp_path / "dist").iterdir()
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if name.startswith(FOLDER)]


def test_kernels_that_there_are_not_are_refused_by_name(tmp_path: Path) -> None:
    done = build("avx2 avx3", tmp_path)
    assert done.returncode == 1
    assert done.stderr.strip() == "SOFTBATCH_KERNELS: there is no avx3; there are all, amx, avx512_bf16, avx512, avx2"
