"""A C++ compiler for tests of the kernels' build: it compiles once, in few pieces, and keeps what came of it.

Each run of a compiler reads torch's headers, and each piece instantiates its own templates; that is most of what a
build takes. So a piece is a folder or more: the object of its first file holds all of it, and those of its others hold
nothing. Whoever builds the same sources in the same way again, in this run of the tests or a later one, gets a copy.
Run as `python compile_once.py DIRECTORY ARGUMENTS…`, with the arguments of c++; DIRECTORY is that of one state of the
sources.
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
    """The status that c++ would end with."""
    if "-shared" in arguments:
        return run(arguments)
    if "c++-header" in arguments:  # read by each piece as it is, but the flags are looked at here
        return run([*flags_of(arguments), "-fsyntax-only", "-x", "c++", "-"], "")
    source, output = (Path(arguments[arguments.index(option) + 1]) for option in ("-c", "-o"))
    root = Path(next(each for each in arguments if each.startswith("-I"))[2:])
    piece = piece_of(source, root)
    is_first = source == piece[0]
    read = "".join(f'#include "{file}"\n' for file in piece) if is_first else ""
    options = arguments[: arguments.index("-c")] if is_first else flags_of(arguments)

    def compile_piece(output: Path) -> bool:
        return run([*options, "-x", "c++", "-c", "-", "-o", str(output)], read) == 0

    kept = directory / digest(flags_of(arguments)) / f"{source.stem}.o"
    kept.parent.mkdir(parents=True, exist_ok=True)
    return 0 if once(kept, compile_piece, output) else 1


def flags_of(arguments: list[str]) -> list[str]:
    """Those that all files of a build share, whatever directory they are compiled in."""
    return arguments[: arguments.index("-fPIC")]


def piece_of(source: Path, root: Path) -> list[Path]:
    """The files that are compiled with this one: the decoders and layers, or all the others."""
    is_llama = source.parent.name == "llama"
    return [file for file in sorted(root.rglob("*.cpp")) if (file.parent.name == "llama") == is_llama]


def run(arguments: list[str], text: str | None = None) -> int:
    return subprocess.run(["c++", *arguments], input=text, text=True, check=False).returncode


def once(kept: Path, make: Callable[[Path], bool], copy: Path) -> bool:
    """Whether `copy` has what `kept` has, which whoever asked first has made."""
    with kept.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not kept.exists():
            part = kept.with_suffix(".part")  # whoever is killed meanwhile leaves no half of a file
            if not make(part):
                return False
            part.replace(kept)
    shutil.copyfile(kept, copy)
    return True


def digest(arguments: list[str]) -> str:
    return hashlib.sha256("\0".join(arguments).encode()).hexdigest()[:16]


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
