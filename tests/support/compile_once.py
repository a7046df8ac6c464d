"""A C++ compiler for tests: it compiles each file once, and what all files include before them.

Whoever builds the same file in the same way again gets a copy. Run as `python compile_once.py DIRECTORY ARGUMENTS…`,
with the arguments of c++.
"""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

HEADERS = ("torch/custom_class.h", "torch/library.h")  # half of the work, and the same for every file


def main(directory: Path, arguments: list[str]) -> int:
    if "-c" not in arguments:
        return subprocess.run(["c++", *arguments], check=False).returncode
    directory.mkdir(parents=True, exist_ok=True)
    headers = headers_compiled(directory, flags_of(arguments))
    if headers is None:
        return 1
    output = Path(arguments[arguments.index("-o") + 1])
    kept = directory / digest(arguments)

    def compile_file() -> bool:
        done = subprocess.run(["c++", "-include", str(headers), *arguments], check=False).returncode == 0
        if done:
            shutil.copyfile(output, kept)
        return done

    if not once(kept, compile_file):
        return 1
    if not output.exists():
        shutil.copyfile(kept, output)
    return 0


def headers_compiled(directory: Path, flags: list[str]) -> Path | None:
    """A header that the compiler has read already with these flags; None where it cannot."""
    header = directory / f"{digest(flags)}.h"
    compiled = header.with_suffix(".h.gch")

    def compile_header() -> bool:
        header.write_text("".join(f"#include <{name}>\n" for name in HEADERS))
        command = ["c++", *flags, "-x", "c++-header", str(header), "-o", str(compiled)]
        return subprocess.run(command, check=False).returncode == 0

    return header if once(compiled, compile_header) else None


def flags_of(arguments: list[str]) -> list[str]:
    """Without the names of files."""
    kept, rest = [], iter(arguments)
    for argument in rest:
        if argument in ("-c", "-o", "-MF"):
            next(rest)
        elif argument != "-MMD":
            kept.append(argument)
    return kept


def once(result: Path, make: Callable[[], bool]) -> bool:
    """Whether `result` is there, made by whoever asked first."""
    with result.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return result.exists() or make()


def digest(arguments: list[str]) -> str:
    return hashlib.sha256("\0".join(arguments).encode()).hexdigest()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
