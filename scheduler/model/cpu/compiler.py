"""From the C++ files to one library: each file by a compiler of its own, all behind one precompiled header."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil

from softbatch.scheduler.model.cpu.prebuilt import CSRC, FLAGS, sources

_HEADERS = ("torch/custom_class.h", "torch/library.h")  # most of what the compiler reads, and the same for every file
_HEADER = "torch_headers.h"
_STANDARD = "-std=c++20"  # that of torch's own headers
_INCLUDED = re.compile(r'^#include "(.+)"', re.MULTILINE)
_BYTES_A_FILE = 3 << 29  # that a compiler may take


def compile_library(directory: Path, name: str, flags: Sequence[str], extra_link_flags: Sequence[str] = ()) -> Path:
    """Compiles the kernels in `directory`. Raises OSError without a compiler, RuntimeError with what it has said."""
    from torch.utils import cpp_extension

    compiler = cpp_extension.get_cxx_compiler()
    if shutil.which(compiler) is None:
        raise FileNotFoundError(f"no C++ compiler: {compiler} is not on the PATH")
    includes = [f"-I{CSRC}", *(f"-isystem{path}" for path in cpp_extension.include_paths("cpu"))]
    command = [compiler, *FLAGS, *flags, _STANDARD, "-fPIC", *includes]
    (directory / _HEADER).write_text("".join(f"#include <{header}>\n" for header in _HEADERS))
    # Flags that the compiler does not know come to light here. A header that is not precompiled is read as it is.
    _run([*command, "-x", "c++-header", _HEADER, "-o", f"{_HEADER}.gch"], directory)

    def compile_file(source: Path) -> str:
        _run([*command, "-include", _HEADER, "-c", str(source), "-o", f"{source.stem}.o"], directory)
        return f"{source.stem}.o"

    longest_first = sorted(sources(), key=lambda source: _bytes_read(source, set()), reverse=True)
    at_once = min(len(os.sched_getaffinity(0)), psutil.virtual_memory().available // _BYTES_A_FILE, len(longest_first))
    with ThreadPoolExecutor(max(at_once, 1), "compiler") as pool:
        objects = list(pool.map(compile_file, longest_first))
    libraries = [f"-L{path}" for path in cpp_extension.library_paths("cpu")]
    libraries += ["-Wl,--as-needed", "-lc10", "-ltorch_cpu", "-ltorch"]
    _run([compiler, "-shared", *objects, "-o", name, "-fopenmp", *libraries, *extra_link_flags], directory)
    return directory / name


def _bytes_read(file: Path, read: set[Path]) -> int:
    """Of our sources, for this one: what a file takes the compiler depends on the templates in its headers."""
    if file in read:
        return 0
    read.add(file)
    text = file.read_text()
    return len(text) + sum(_bytes_read(CSRC / name, read) for name in _INCLUDED.findall(text))


def _run(command: list[str], directory: Path) -> None:
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{command[0]} has failed:\n{done.stderr}")
