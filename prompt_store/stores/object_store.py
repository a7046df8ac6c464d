"""The store that is a bucket: content first, under its hash, then one small record that gives it a name."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

import msgspec

from softbatch.prompt_store.atomic_files import replacing, sync
from softbatch.prompt_store.manifest import ModelSpec, SoftPromptError
from softbatch.prompt_store.names import check_name, is_name
from softbatch.prompt_store.soft_prompt_file import check_file
from softbatch.prompt_store.stores.bounded_copy import NO_LINK, copy_bounded
from softbatch.prompt_store.stores.bucket import Bucket, BucketAddressError, BucketError, Offers
from softbatch.prompt_store.stores.bucket_files import Etag
from softbatch.prompt_store.stores.bucket_sweep import remove_stale, sweep, tell_of
from softbatch.prompt_store.stores.kept_text import FORMAT_VERSION as TEXT_VERSION
from softbatch.prompt_store.stores.kept_text import KeptText, check_kept
from softbatch.prompt_store.stores.name_table import NameTable
from softbatch.prompt_store.stores.prompt_record import (
    PromptRecord,
    content_key,
    new_nonce,
    record_key,
    seal,
)
from softbatch.prompt_store.stores.store import NameChanged, NameTaken, SoftPromptStore, StoredPrompt, UnknownPrompt
from softbatch.prompt_store.stores.verified_cache import VerifiedCache, WrongContent

logger = logging.getLogger(__name__)
REFRESH_SECONDS = 2.0  # a name that came or went elsewhere is seen here by then
DAMAGED_SECONDS = 60.0  # then a damaged object is asked for again
_TRIES = 5


@dataclass(frozen=True)
class StagedPrompt:
    """Objects that no name leads to yet. `record`, written under the name's key, registers them."""

    stored: StoredPrompt
    record: PromptRecord

    @property
    def sealed(self) -> bytes:
        return seal(msgspec.json.encode(self.record))


class ObjectStore(SoftPromptStore):
    """The bucket is the only state, so any number of machines may share it; `root` holds copies alone.

    A name comes with its record, in one write, and goes with it. Every registration has objects of its own, so that
    deleting them takes nothing from another. What is read was hashed on this machine.
    """

    keeps_leases = False

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

    @cached_property
    def offers(self) -> Offers:
        """Found out once. Raises BucketError, or BucketAddressError without a bucket."""
        try:
            offers = self.bucket.probe()
        except FileNotFoundError:
            raise BucketAddressError(f"{self.location}: there is no such bucket") from None
        tell_of(self.location, offers)
        return offers

    def check_free(self, name: str) -> None:
        check_name(name)
        if not self.is_free(name):
            raise NameTaken(name)

    def is_free(self, name: str) -> bool:
        return self.bucket.etag(record_key(name)) is None

    def add(self, name: str, file: Path, spec: ModelSpec | None = None, kept: KeptText | None = None) -> StoredPrompt:
        return self._publish_or_discard(self.stage(name, file, spec, kept))

    def swap(self, name: str, previous: str, file: Path, kept: KeptText | None = None) -> StoredPrompt:
        check_name(name)
        found = self._names.look_up(name)
        if not isinstance(found, PromptRecord) or found.sha256 != previous:
            raise NameChanged(name, is_gone=found is None)
        return self._publish_or_discard(self.stage(name, file, kept=kept, previous=found))

    def _publish_or_discard(self, staged: StagedPrompt) -> StoredPrompt:
        try:
            return self.publish(staged)
        except (NameTaken, NameChanged):
            self.discard(staged.record)
            raise

    def stage(
        self,
        name: str,
        file: Path,
        spec: ModelSpec | None = None,
        kept: KeptText | None = None,
        previous: PromptRecord | None = None,
    ) -> StagedPrompt:
        """Check all of it and put its objects into the bucket, for a name that is free, or that leads to `previous`.
        Raises like `add`."""
        if previous is None:
            self.check_free(name)
        if kept is not None:
            check_kept(kept)
        descriptor, path = tempfile.mkstemp(prefix=".add-", dir=self._cache.directory)
        temp = Path(path)
        try:
            with file.open("rb") as source, open(descriptor, "wb") as target:
                sha256 = copy_bounded(source, target, self.max_bytes)
            manifest = check_file(temp, self.max_bytes, spec)
            text = None if kept is None else msgspec.json.encode(kept)
            record = PromptRecord(
                name=name,
                sha256=sha256,
                num_bytes=temp.stat().st_size,
                manifest=manifest.model_dump(mode="json"),
                created_at=int(time.time()),
                nonce=new_nonce(),
                text_sha256=None if text is None else hashlib.sha256(text).hexdigest(),
                text_bytes=0 if text is None else len(text),
                recall=None if kept is None else kept.recall,
                previous=None if previous is None else previous.nonce,
            )
            if text is not None:
                self.bucket.write(record.text_key, text)
            self._upload(temp, record)
            temp.chmod(0o400)
            self._cache.put(sha256, temp)
        finally:
            temp.unlink(missing_ok=True)
        return StagedPrompt(self.describe(record), record)

    def publish(self, staged: StagedPrompt) -> StoredPrompt:
        """Give what was staged its name; once more does no harm. Raises NameTaken, or NameChanged: its objects are for
        `discard` then."""
        record = staged.record
        key = record_key(record.name)
        if record.previous is not None:
            return self._take_place(staged)
        if not self.offers.create and self.bucket.etag(key) is not None:
            taken = self.bucket.read(key)
            is_free = taken is None or taken[0] == staged.sealed
        else:
            is_free = True
        if not is_free or not self._create(key, staged.sealed):
            raise NameTaken(record.name)
        self._names.forget(record.name)
        return self.get(record.name)

    def _take_place(self, staged: StagedPrompt) -> StoredPrompt:
        """Raises NameChanged."""
        record, before = staged.record, None
        for _ in range(_TRIES):
            found, etag = self._names.look_up_version(record.name) or (None, "")
            if found == record:  # perhaps by somebody who was killed since
                self._names.learn(record)  # before the objects go, so that nobody here asks for them
                if before is not None:
                    self.discard(before)
                return self.get(record.name)
            if not isinstance(found, PromptRecord) or found.nonce != record.previous:
                raise NameChanged(record.name, is_gone=found is None)
            before = found
            self._replace(record_key(record.name), staged.sealed, etag)
        raise BucketError(f"{self.location}/{record_key(record.name)} cannot be replaced ({_TRIES} tries)")

    def _replace(self, key: str, sealed: bytes, etag: Etag) -> None:
        """Unless it is another by now, as exactly as the bucket can tell."""
        if self.offers.replace:
            self.bucket.replace(key, sealed, etag)
        elif self.bucket.etag(key) == etag:
            self.bucket.write(key, sealed)

    def is_whole(self, record: PromptRecord) -> bool:
        """Whether its file is in the bucket, as far as a look tells."""
        return self.bucket.etag(record.key) is not None

    def _create(self, key: str, sealed: bytes) -> bool:
        if self.offers.create:
            return self.bucket.create(key, sealed)
        self.bucket.write(key, sealed)
        found = self.bucket.read(key)
        return found is not None and found[0] == sealed

    def _upload(self, file: Path, record: PromptRecord) -> None:
        """Read back, as a name must never lead to what was damaged on its way there. Raises BucketError."""
        for _ in range(_TRIES):
            self.bucket.upload(file, record.key)
            with tempfile.NamedTemporaryFile(prefix=".check-", dir=self._cache.directory) as arrived:
                with contextlib.suppress(BucketError):  # among them that the store's own checksum is another
                    self.bucket.hasty(2).download(record.key, Path(arrived.name))
                if hashlib.file_digest(arrived, "sha256").hexdigest() == record.sha256:
                    return
        raise BucketError(f"{self.location}/{record.key} arrives damaged in the bucket ({_TRIES} tries)")

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

    def remove(self, name: str, only: str | None = None) -> None:
        if not is_name(name):
            raise UnknownPrompt(name)
        found = self._names.look_up_version(name)
        if found is None:
            raise UnknownPrompt(name) if only is None else NameChanged(name, is_gone=True)
        record, etag = found
        if only is not None and (not isinstance(record, PromptRecord) or record.sha256 != only):
            raise NameChanged(name, is_gone=False)
        self.bucket.delete(record_key(name), etag)
        self._names.forget(name)
        if isinstance(record, PromptRecord):
            self._drop_copies(record)
            self.discard(record)

    def discard(self, record: PromptRecord) -> None:
        """Delete objects that no name leads to any more, or never did."""
        for key in (record.key, record.text_key if record.text_sha256 else None):
            if key is not None:
                try:
                    self.bucket.delete(key)
                except OSError as error:  # `remove_stale` finds them later
                    logger.warning("%s", error.strerror)

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

    def remove_stale(self) -> None:
        remove_stale(self.bucket, self._names.look_up)

    def sweep(self) -> None:
        """`remove_stale` beside everything else, if this may be done, and this machine's copies of names that went
        while no server was here. Raises like `offers`."""
        may_write = self.offers.write

        def remove() -> None:
            self.drop_unnamed()
            if may_write:
                self.remove_stale()

        sweep(self.location, remove)

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
