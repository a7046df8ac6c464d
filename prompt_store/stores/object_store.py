"""The store that is a bucket, and giving names there: content first, under its hash, then one small record."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import tempfile
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import msgspec

from softbatch.prompt_store.manifest import ModelSpec
from softbatch.prompt_store.names import check_name, is_name
from softbatch.prompt_store.soft_prompt_file import check_file
from softbatch.prompt_store.stores.bounded_copy import copy_bounded
from softbatch.prompt_store.stores.bucket import BucketAddressError, BucketError, Offers
from softbatch.prompt_store.stores.bucket_files import Etag
from softbatch.prompt_store.stores.bucket_sweep import remove_stale, sweep, tell_of
from softbatch.prompt_store.stores.kept_text import KeptText, check_kept
from softbatch.prompt_store.stores.object_reader import ObjectReader
from softbatch.prompt_store.stores.prompt_record import PromptRecord, new_nonce, record_key, seal
from softbatch.prompt_store.stores.store import NameChanged, NameTaken, SoftPromptStore, StoredPrompt, UnknownPrompt

logger = logging.getLogger(__name__)
_TRIES = 5


@dataclass(frozen=True)
class StagedPrompt:
    """Objects that no name leads to yet. `record`, written under the name's key, registers them."""

    stored: StoredPrompt
    record: PromptRecord

    @property
    def sealed(self) -> bytes:
        return seal(msgspec.json.encode(self.record))


class ObjectStore(ObjectReader, SoftPromptStore):
    """The bucket is the only state, so any number of machines may share it; `root` holds copies alone.

    A name comes with its record, in one write, and goes with it. Every registration has objects of its own, so that
    deleting them takes nothing from another.
    """

    keeps_leases = False

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
        if not self._create(key, staged.sealed):
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
        """Unless the name is given to another, as exactly as the bucket can tell."""
        if self.offers.create:
            return self.bucket.create(key, sealed)
        if self.bucket.etag(key) is None:
            self.bucket.write(key, sealed)
        return self.bucket.holds(key, sealed) is not None

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
