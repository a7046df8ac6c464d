"""Reading soft prompts in a bucket by their names: from this machine's copies, which were hashed on their way."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import msgspec

from softbatch.prompt_store.atomic_files import replacing, sync
from softbatch.prompt_store.manifest import SoftPromptError
from softbatch.prompt_store.names import check_name, is_name
from softbatch.prompt_store.stores.bounded_copy import NO_LINK, copy_bounded
from softbatch.prompt_store.stores.bucket import Bucket
from softbatch.prompt_store.stores.kept_text import FORMAT_VERSION as TEXT_VERSION
from softbatch.prompt_store.stores.kept_text import KeptText, check_kept
from softbatch.prompt_store.stores.name_table import NameTable
from softbatch.prompt_store.stores.prompt_record import PromptRecord, content_key
from softbatch.prompt_store.stores.store import StoredPrompt, UnknownPrompt
from softbatch.prompt_store.stores.verified_cache import VerifiedCache, WrongContent

logger = logging.getLogger(__name__)
REFRESH_SECONDS = 2.0  # a name that came or went elsewhere is seen here by then
DAMAGED_SECONDS = 60.0  # then a damaged object is asked for again
_TRIES = 5


class ObjectReader:
    """Owns the copies in `root` and what is known of the names. Needs no right but to list and to read."""

    def __init__(
        self, bucket: Bucket, root: Path, max_bytes: int, cache_bytes: int, refresh: float = REFRESH_SECONDS
    ) -> None:
        """Raises OSError of the disk; the bucket itself is not asked for anything yet."""
        self.root, self.max_bytes, self.location = root, max_bytes, bucket.url
        self.bucket = bucket
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._cache = VerifiedCache(root / "objects", cache_bytes)
        self._names = NameTable(bucket, self.describe, refresh, self._drop_copies)
        self._damaged: dict[str, tuple[float, str]] = {}  # by key

    def get(self, name: str) -> StoredPrompt:
        if not is_name(name):
            raise UnknownPrompt(name)
        return self._usable(name, self._names.get(name))

    def _usable(self, name: str, found: StoredPrompt | SoftPromptError | None) -> StoredPrompt:
        if found is None:
            raise UnknownPrompt(name)
        if isinstance(found, SoftPromptError):
            raise SoftPromptError(str(found), param=found.param, code=found.code)
        self._check_sound(_key_of(found))
        if found.num_bytes > self.max_bytes:
            message = f"the file has {found.num_bytes} bytes; at most {self.max_bytes} are allowed"
            raise SoftPromptError(message, param="file", code="too_large")
        return found

    def is_known(self, name: str) -> bool:
        return is_name(name) and self._names.is_known(name)

    def kept_text(self, stored: StoredPrompt) -> KeptText | None:
        if stored.recall is None:
            return None
        record = self._names.record(stored)
        if record is None or record.text_sha256 is None:
            raise UnknownPrompt(stored.name)
        key, sha256, size = record.text_key, record.text_sha256, record.text_bytes
        self._check_sound(key)
        try:
            content = self._cache.read(sha256, size, lambda target: self.bucket.download(key, target))
            kept = msgspec.json.decode(content, type=KeptText)
            check_kept(kept)
            if kept.format_version == TEXT_VERSION:
                return kept
            reason = f"it has format {kept.format_version}; this server reads format {TEXT_VERSION}"
        except FileNotFoundError:
            reason = self._reason_of_gone(stored)
        except (WrongContent, msgspec.MsgspecError, SoftPromptError) as error:
            reason = str(error)
        raise self._damage(stored.name, key, reason)

    def local_file(self, stored: StoredPrompt) -> Path:
        """Raises SoftPromptError where the object is damaged, by its name."""
        key = _key_of(stored)
        self._check_sound(key)
        try:
            return self._cache.get(stored.sha256, stored.num_bytes, lambda path: self.bucket.download(key, path))
        except FileNotFoundError:
            reason = self._reason_of_gone(stored)
        except WrongContent as error:
            reason = str(error)
        raise self._damage(stored.name, key, reason)

    def _reason_of_gone(self, stored: StoredPrompt) -> str:
        """Raises UnknownPrompt where its name is gone too."""
        self._names.expire(stored.name)
        if self._names.get(stored.name) != stored:
            raise UnknownPrompt(stored.name) from None
        return "it is missing"

    def _damage(self, name: str, key: str, reason: str) -> SoftPromptError:
        """Remembered, so that not every request fetches it a few times."""
        said = f"the object {self.location}/{key} is damaged: {reason}"
        self._damaged[key] = (time.monotonic(), said)
        logger.error("soft prompt %s cannot be used: %s", name, said)
        return SoftPromptError(said, param="file", code="invalid_file")

    def _check_sound(self, key: str) -> None:
        """Raises SoftPromptError for what was damaged a moment ago."""
        since, reason = self._damaged.get(key, (0.0, ""))
        if reason and time.monotonic() - since < DAMAGED_SECONDS:
            raise SoftPromptError(reason, param="file", code="invalid_file")

    def open(self, name: str) -> tuple[StoredPrompt, BinaryIO]:
        for _ in range(_TRIES):
            stored = self.get(name)
            # Others needed its place on the disk, or gave another the name.
            with contextlib.suppress(FileNotFoundError, UnknownPrompt):
                return stored, self.local_file(stored).open("rb")
        raise UnknownPrompt(name)

    def list(self) -> Sequence[StoredPrompt]:
        return [prompt for _, prompt in self._scan() if isinstance(prompt, StoredPrompt)]

    def broken(self) -> Sequence[tuple[str, str]]:
        return [(name, str(found)) for name, found in self._scan() if isinstance(found, SoftPromptError)]

    def _scan(self) -> Sequence[tuple[str, StoredPrompt | SoftPromptError]]:
        scanned: list[tuple[str, StoredPrompt | SoftPromptError]] = []
        for name, found in self._names.all():
            try:
                check_name(name)
                scanned.append((name, self._usable(name, found)))
            except SoftPromptError as error:
                scanned.append((name, error))
        return scanned

    def changed_at(self) -> int:
        return self._names.changed_at

    def export(self, name: str, path: Path) -> None:
        _, file = self.open(name)
        with file, replacing(path) as temp, temp.open("xb") as target:
            copy_bounded(file, target, self.max_bytes)
        sync(path.parent)

    def lease(self, stored: StoredPrompt, directory: Path) -> Path:
        """A hard link to this machine's copy, named `<sha256>.safetensors`."""
        directory.mkdir(parents=True, exist_ok=True)
        target = directory / f"{stored.sha256}.safetensors"
        for _ in range(_TRIES):
            if target.exists():
                return target
            with contextlib.suppress(FileNotFoundError), replacing(target) as temp:
                copy = self.local_file(stored)
                try:
                    os.link(copy, temp)
                except OSError as error:
                    if error.errno not in NO_LINK:
                        raise
                    shutil.copyfile(copy, temp)
        raise UnknownPrompt(stored.name)

    def drop_unnamed(self) -> None:
        """Raises OSError."""
        held = self._cache.held()  # before the names: what is registered meanwhile stays
        self._names.all()
        named = {sha256 for record in self._names.records() for sha256 in (record.sha256, record.text_sha256)}
        for sha256 in held:
            if sha256 not in named:
                self._cache.drop(sha256)

    def _drop_copies(self, record: PromptRecord) -> None:
        """The text above all: it is as private as the soft prompt, and goes with it. Leases are links of their own."""
        used = {sha256 for other in self._names.records() for sha256 in (other.sha256, other.text_sha256)}
        for sha256 in (record.sha256, record.text_sha256):
            if sha256 is not None and sha256 not in used:
                self._cache.drop(sha256)

    def describe(self, record: PromptRecord) -> StoredPrompt:
        """Raises SoftPromptError."""
        return StoredPrompt(
            record.name,
            self._cache.path(record.sha256),
            record.sha256,
            record.num_bytes,
            record.parsed_manifest(),
            record.created_at,
            (int(record.nonce, 16),),
            record.recall,
        )


def _key_of(stored: StoredPrompt) -> str:
    return content_key(stored.name, stored.sha256, f"{stored.version[0]:014x}")
