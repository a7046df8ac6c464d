"""A C++ compiler for tests of the kernels' build: it compiles each file once, and keeps what came of it.

Whoever builds the same sources in the same way again, in this run of the tests or a later one, gets a copy. Run as
`python compile_once.py DIRECTORY ARGUMENTS…`, with the arguments of c++; DIRECTORY is that of one state of the sources.
"""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def main(directory: Path, arguments: list[str]) -> int:
    if "-shared" in arguments:
        return run(arguments)
    kept = directory / digest(arguments[: arguments.index("-fPIC")])  # the flags, which all files of a build share
    kept.mkdir(parents=True, exist_ok=True)
    output = Path(arguments[arguments.index("-o") + 1])
    sources = Path(next(each for each in arguments if each.startswith("-I"))[2:])
    if output.suffix == ".gch" and is_whole(kept, sources):
        output.touch()  # the objects are there: nobody reads it
        return 0

    def compile_file() -> bool:
        if run(arguments) != 0:
            return False
        part = kept / f"{output.name}.part"  # whoever is killed meanwhile leaves no half of a file
        shutil.copyfile(output, part)
        part.replace(kept / output.name)
        return True

    if not once(kept / output.name, compile_file, output):
        return 1
    if output.suffix != ".gch" and is_whole(kept, sources):
        for header in kept.glob("*.gch"):  # hundreds of megabytes
            with locked(header):
                header.unlink(missing_ok=True)
    return 0


def run(arguments: list[str]) -> int:
    return subprocess.run(["c++", *arguments], check=False).returncode


def is_whole(kept: Path, sources: Path) -> bool:
    return all((kept / f"{source.stem}.o").exists() for source in sources.rglob("*.cpp"))


def once(result: Path, make: Callable[[], bool], copy: Path) -> bool:
    """Whether `copy` has what `result` has, which whoever asked first has made."""
    with locked(result):
        if not result.exists() and not make():
            return False
        if not copy.exists():
            shutil.copyfile(result, copy)
        return True


@contextmanager
def locked(path: Path) -> Iterator[None]:
    with path.with_suffix(f"{path.suffix}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def digest(arguments: list[str]) -> str:
    return hashlib.sha256("\0".join(arguments).encode()).hexdigest()[:16]


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
