"""Files that appear whole or not at all, and locks that go with the process that holds them."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any


def sync(path: Path) -> None:
    """Wait until a file's content, or a directory's entries, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name in the same directory, renamed to `path` at the end unless something is raised.

    The name is new each time and begins with a dot, so any number of processes may write `path` at once.
    """
    temporary = path.parent / f".{secrets.token_hex(8)}.tmp"
    try:
        yield temporary
        temporary.replace(path)
    finally:
        # Renaming onto another link of the same file leaves both names.
        temporary.unlink(missing_ok=True)


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Write beside the target and rename: a reader or a crash never sees half a file.

    `path` has one writer at a time: the temporary name is always the same, so crashes leave at most one such file.
    """
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    sync(temporary)
    temporary.replace(path)


def lock(file: int | IO[Any], wait: bool = False) -> None:
    """Lock an open file or directory until it is closed or its process ends.

    Raises BlockingIOError when another process holds the lock, OSError when the file system has no locks.
    """
    fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
