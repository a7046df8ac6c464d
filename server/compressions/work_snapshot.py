"""What an unfinished run goes on from, as copies in the bucket: whole files of one moment."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import secrets
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from softbatch.prompt_store.stores.bucket import Bucket
from softbatch.server.compressions.shared_record import FOLDER, SavedFile

logger = logging.getLogger(__name__)
_PARTS = ("work", "model")
_TRIES = 3
Stamp = tuple[int, int, int]


class WorkSnapshots:
    """Of one run's directory, whose files are only ever replaced whole. A holder's objects are its own: deleting them
    takes nothing from whoever goes on with the job."""

    def __init__(self, bucket: Bucket, job_id: str, token: int, directory: Path) -> None:
        self._bucket, self._directory = bucket, directory
        self._folder = f"{FOLDER}{job_id}/files/{token:06d}-"
        self._saved: dict[str, tuple[Stamp, SavedFile]] = {}

    def save(self) -> dict[str, SavedFile] | None:
        """None where nothing has changed, or too much at once. Raises BucketError or OSError."""
        aside = self._directory / f".snapshot-{secrets.token_hex(4)}"
        try:
            stamps = self._link(aside)
            if stamps is None or stamps == {name: stamp for name, (stamp, _) in self._saved.items()}:
                return None
            for name in self._saved.keys() - stamps.keys():
                del self._saved[name]
            for name, stamp in stamps.items():
                if name not in self._saved or self._saved[name][0] != stamp:
                    self._saved[name] = (stamp, self._upload(aside / name))
            return {name: saved for name, (_, saved) in self._saved.items()}
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    def _link(self, aside: Path) -> dict[str, Stamp] | None:
        """Hard links to all files, if none of them was replaced meanwhile."""
        for _ in range(_TRIES):
            shutil.rmtree(aside, ignore_errors=True)
            before = self._stamps()
            with contextlib.suppress(FileNotFoundError):
                for name in before:
                    (aside / name).parent.mkdir(parents=True, exist_ok=True)
                    os.link(self._directory / name, aside / name)
                if self._stamps() == before:
                    return before
        return None

    def _stamps(self) -> dict[str, Stamp]:
        found = {}
        for part in _PARTS:
            top = self._directory / part
            for path in [top] if top.is_file() else sorted(top.rglob("*")):
                if path.is_file() and not path.name.startswith(".") and not path.name.endswith(".tmp"):
                    with contextlib.suppress(FileNotFoundError):
                        stat = path.stat()
                        found[str(path.relative_to(self._directory))] = (stat.st_ino, stat.st_mtime_ns, stat.st_size)
        return found

    def _upload(self, path: Path) -> SavedFile:
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        saved = SavedFile(f"{self._folder}{sha256}", sha256, path.stat().st_size)
        self._bucket.upload(path, saved.key)
        return saved

    def discard(self, files: Iterable[SavedFile]) -> None:
        """Those of this holder, which the record names no more."""
        for saved in files:
            if saved.key.startswith(self._folder):
                self._bucket.delete(saved.key)


def restore(bucket: Bucket, files: Mapping[str, SavedFile], directory: Path) -> bool:
    """Put them back. False, and none of them is there, where one is gone or damaged: then the run begins anew."""
    try:
        for name, saved in files.items():
            path = directory / name
            if not path.resolve().is_relative_to(directory.resolve()):
                raise ValueError(f"{name} lies elsewhere")
            path.parent.mkdir(parents=True, exist_ok=True)
            for _ in range(_TRIES):
                bucket.download(saved.key, path)
                with path.open("rb") as file:
                    if hashlib.file_digest(file, "sha256").hexdigest() == saved.sha256:
                        break
            else:
                raise ValueError(f"{saved.key} is damaged")
    except (FileNotFoundError, ValueError) as error:
        logger.warning("the run begins anew, as its files in the bucket are of no use: %s", error)
        for part in _PARTS:
            shutil.rmtree(directory / part, ignore_errors=True)
        (directory / "model").unlink(missing_ok=True)
        return False
    return bool(files)
