"""Files that appear whole or not at all, and locks and directories that go with the process that holds them."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import tempfile
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


@contextlib.contextmanager
def process_directory(root: Path, prefix: str) -> Iterator[Path]:
    """A directory of this process's own in `root`; what killed processes left behind under `prefix` is removed.

    It is locked for as long as its process lives: process ids mean nothing to other containers on the same file system.
    """
    for old in root.glob(f"{prefix}*"):
        with contextlib.suppress(OSError), _opened(old) as descriptor:
            lock(descriptor)
            shutil.rmtree(old, ignore_errors=True)
    # Under its name only once it is locked, so that nobody takes it for an old one.
    aside = Path(tempfile.mkdtemp(prefix=".new-", dir=root))
    with _opened(aside) as descriptor:
        # A file system that cannot lock directories keeps the old ones.
        with contextlib.suppress(OSError):
            lock(descriptor)
        directory = aside.rename(root / aside.name.replace(".new-", prefix))
        try:
            yield directory
        finally:
            shutil.rmtree(directory, ignore_errors=True)


@contextlib.contextmanager
def _opened(directory: Path) -> Iterator[int]:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
