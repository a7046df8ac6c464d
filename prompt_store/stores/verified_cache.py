"""Files of a bucket on this machine's disk, under their SHA-256: whole, hashed, and of bounded size together."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import secrets
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

logger = logging.getLogger(__name__)
_TRIES = 4
_TEMPORARY = ".tmp"
_STALE_SECONDS = 3600


class WrongContent(ValueError):
    """What arrived, however often it was fetched, is not what the hash says."""


class VerifiedCache:
    """Any number of processes may share the directory. Of the files that nobody has linked elsewhere, those used
    longest ago go first when there is no room; one that is linked costs nothing to keep, and stays."""

    def __init__(self, directory: Path, max_bytes: int) -> None:
        self.directory, self.max_bytes = directory, max_bytes
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._verified: set[str] = set()  # in this process
        self._locks: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)
        self._guard = threading.Lock()
        for path in directory.glob(".*"):  # what crashes have left
            with contextlib.suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                    path.unlink()

    def path(self, sha256: str) -> Path:
        return self.directory / f"{sha256}.safetensors"

    def get(self, sha256: str, num_bytes: int, fetch: Callable[[Path], None]) -> Path:
        """The file, fetched unless it is here. Raises WrongContent, and what `fetch` raises."""
        path = self.path(sha256)
        with self._alone(sha256):
            if self._is_sound(path, sha256):
                with contextlib.suppress(FileNotFoundError):
                    os.utime(path)
                    return path
            self._make_room(num_bytes)
            return self._fetched(sha256, fetch)

    def read(self, sha256: str, num_bytes: int, fetch: Callable[[Path], None]) -> bytes:
        """Its content. Raises like `get`."""
        for _ in range(_TRIES):
            path = self.get(sha256, num_bytes, fetch)
            with contextlib.suppress(FileNotFoundError):  # others needed its place on the disk
                return path.read_bytes()
        raise WrongContent("it leaves the disk as soon as it is there")

    def put(self, sha256: str, file: Path) -> None:
        """Take over a file that was hashed, and that lies on the same file system."""
        with self._alone(sha256):
            self._make_room(file.stat().st_size)
            file.replace(self.path(sha256))
            self._verified.add(sha256)

    def drop(self, sha256: str) -> None:
        """Whoever has linked or opened it keeps it. Does not wait for who fetches it."""
        self._verified.discard(sha256)
        with contextlib.suppress(OSError):
            self.path(sha256).unlink(missing_ok=True)

    def held(self) -> list[str]:
        return [path.stem for path in self.directory.glob("[!.]*")]

    def _fetched(self, sha256: str, fetch: Callable[[Path], None]) -> Path:
        temporary = self.directory / f".{secrets.token_hex(8)}{_TEMPORARY}"
        found = ""
        try:
            for attempt in range(_TRIES):
                fetch(temporary)
                found = _hash(temporary)
                if found == sha256:
                    temporary.chmod(0o400)
                    self._verified.add(sha256)
                    return temporary.replace(self.path(sha256))
                logger.warning("%s arrived with SHA-256 %s, try %d of %d", sha256, found, attempt + 1, _TRIES)
        finally:
            temporary.unlink(missing_ok=True)
        raise WrongContent(f"its SHA-256 is {found}, not {sha256}")

    def _is_sound(self, path: Path, sha256: str) -> bool:
        if not path.exists():
            return False
        if sha256 in self._verified:
            return True
        with contextlib.suppress(FileNotFoundError):
            if _hash(path) == sha256:
                self._verified.add(sha256)
                return True
            logger.warning("%s on this machine's disk is damaged and fetched again", path)
            path.unlink(missing_ok=True)
        return False

    def _make_room(self, num_bytes: int) -> None:
        files = []
        for path in self.directory.glob("[!.]*"):
            with contextlib.suppress(FileNotFoundError):
                files.append((path, path.stat()))
        total = num_bytes + sum(found.st_size for _, found in files)
        for path, found in sorted(files, key=lambda file: file[1].st_mtime_ns):
            if total <= self.max_bytes:
                return
            if found.st_nlink == 1:
                path.unlink(missing_ok=True)
                total -= found.st_size

    @contextlib.contextmanager
    def _alone(self, sha256: str) -> Iterator[None]:
        with self._guard:
            lock = self._locks[sha256]
        with lock:
            yield


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
