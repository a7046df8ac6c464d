"""A C++ compiler for tests: it compiles each file once.

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


def main(directory: Path, arguments: list[str]) -> int:
    if "-shared" in arguments:
        return subprocess.run(["c++", *arguments], check=False).returncode
    directory.mkdir(parents=True, exist_ok=True)
    output = Path(arguments[arguments.index("-o") + 1])
    kept = directory / digest(arguments)

    def compile_file() -> bool:
        done = subprocess.run(["c++", *arguments], check=False).returncode == 0
        if done:
            shutil.copyfile(output, kept)
        return done

    if not once(kept, compile_file):
        return 1
    if not output.exists():
        shutil.copyfile(kept, output)
    return 0


def once(result: Path, make: Callable[[], bool]) -> bool:
    """Whether `result` is there, made by whoever asked first."""
    with result.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return result.exists() or make()


def digest(arguments: list[str]) -> str:
    return hashlib.sha256("\0".join(arguments).encode()).hexdigest()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
