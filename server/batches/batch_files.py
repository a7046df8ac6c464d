"""Where the contents of batches' files lie: one file for each id, whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from softbatch.prompt_store.atomic_files import sync


class BatchFiles:
    """Owns a directory; a name that begins with a dot is that of a file being written. Methods raise OSError."""

    def __init__(self, root: Path) -> None:
        root.mkdir(parents=True, exist_ok=True)
        self._root = root

    def path(self, file_id: str) -> Path:
        return self._root / file_id

    @contextlib.contextmanager
    def upload(self) -> Iterator[BinaryIO]:
        """A file to write into; gone at the end unless it is kept."""
        path = self._root / f".{secrets.token_hex(8)}"
        with path.open("w+b") as file:
            try:
                yield file
            finally:
                path.unlink(missing_ok=True)

    def keep(self, file: BinaryIO, file_id: str) -> int:
        """Give an uploaded file its name; returns its bytes."""
        file.flush()
        os.fsync(file.fileno())
        Path(file.name).rename(self.path(file_id))
        sync(self._root)
        return os.fstat(file.fileno()).st_size

    def write(self, file_id: str, lines: Iterable[bytes]) -> int:
        with self.upload() as file:
            for line in lines:
                file.write(line + b"\n")
            return self.keep(file, file_id)

    def remove(self, file_id: str) -> None:
        self.path(file_id).unlink(missing_ok=True)

    def remove_others(self, known: Collection[str]) -> None:
        """What nobody has been told of: left by a server that ended in the middle."""
        for path in self._root.iterdir():
            if path.name not in known:
                path.unlink(missing_ok=True)
