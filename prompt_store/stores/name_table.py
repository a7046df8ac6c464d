"""What this process knows of the names in a bucket: each looked at again once it is a few seconds old."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from softbatch.prompt_store.manifest import SoftPromptError
from softbatch.prompt_store.names import is_name
from softbatch.prompt_store.stores.bucket import Bucket, BucketDenied, BucketError
from softbatch.prompt_store.stores.bucket_files import Etag
from softbatch.prompt_store.stores.prompt_record import NAMES, PromptRecord, name_of, read_record, record_key
from softbatch.prompt_store.stores.store import StoredPrompt

logger = logging.getLogger(__name__)
Found = StoredPrompt | SoftPromptError
OUTAGE_SECONDS = 10.0
_NO_ANSWER = (BucketError, BucketDenied)  # a token that has run out is an outage too
_READERS = 16
_LEAST_TRIES = 3  # of a record that arrives damaged
_LOCKS = 64
_MAX_ABSENT = 10_000


@dataclass(frozen=True)
class _Entry:
    etag: Etag
    record: PromptRecord | SoftPromptError
    found: Found
    seen: float


class NameTable:
    """Thread-safe. While the bucket gives no answer, what is known stays good: a name that goes, or whose preview is
    swapped for the trained one, is seen late. A name that stays is known at every moment."""

    def __init__(
        self,
        bucket: Bucket,
        describe: Callable[[PromptRecord], StoredPrompt],
        refresh: float,
        on_gone: Callable[[PromptRecord], None] = lambda record: None,
    ) -> None:
        """`on_gone` hears of each registration that is seen to have gone; it must not raise."""
        self._bucket, self._describe, self._refresh, self._on_gone = bucket, describe, refresh, on_gone
        self._hasty, self._brisk = bucket.hasty(2), bucket.hasty(4)
        self._entries: dict[str, _Entry] = {}
        self._absent: dict[str, float] = {}
        self._listed = -float("inf")
        self._was_listed = False
        self._listing = threading.Lock()
        self._locks = [threading.Lock() for _ in range(_LOCKS)]
        self._told = -float("inf")
        self.changed_at = time.time_ns()

    def get(self, name: str) -> Found | None:
        """None for no such name, as of at most a refresh ago. Raises BucketError or BucketDenied for one that was
        never seen."""
        with self._locks[hash(name) % _LOCKS]:
            entry, now = self._entries.get(name), time.monotonic()
            if entry is not None and now - entry.seen < self._refresh:
                return entry.found
            if entry is None and now - self._absent.get(name, -float("inf")) < self._refresh:
                return None
            try:
                fresh = self._look(name, entry, self._brisk if entry is None else self._hasty)
            except _NO_ANSWER as error:
                if entry is None:
                    raise
                self._tell(error)
                fresh = replace(entry, seen=now + OUTAGE_SECONDS)  # requests should not wait for it each time
            return None if fresh is None else self._keep(name, fresh).found

    def look_up(self, name: str) -> PromptRecord | SoftPromptError | None:
        """As the bucket says now."""
        found = self.look_up_version(name)
        return None if found is None else found[0]

    def look_up_version(self, name: str) -> tuple[PromptRecord | SoftPromptError, Etag] | None:
        """And the record's ETag."""
        entry = self._look(name, None, self._bucket)
        return None if entry is None else (entry.record, entry.etag)

    def record(self, stored: StoredPrompt) -> PromptRecord | None:
        """That of this very registration, or of the one that has taken its place."""
        entry = self._entries.get(stored.name) or self._look(stored.name, None, self._bucket)
        if entry is None or not isinstance(entry.record, PromptRecord):
            return None
        nonces = (entry.record.nonce, entry.record.previous)
        return entry.record if stored.version in [(int(nonce, 16),) for nonce in nonces if nonce] else None

    def records(self) -> Sequence[PromptRecord]:
        """Those known by now."""
        return [entry.record for entry in list(self._entries.values()) if isinstance(entry.record, PromptRecord)]

    def forget(self, name: str) -> None:
        """It has come or gone by this process's own doing."""
        self._drop(name)
        self._absent.pop(name, None)
        self._listed = -float("inf")

    def learn(self, record: PromptRecord) -> None:
        """By this process's own doing it is this one now."""
        self._keep(record.name, _Entry("", record, self._describe(record), -float("inf")))
        self._listed = -float("inf")

    def expire(self, name: str) -> None:
        """It is looked at again when it is asked for."""
        if (entry := self._entries.get(name)) is not None:
            self._entries[name] = replace(entry, seen=-float("inf"))
        self._listed = -float("inf")

    def is_known(self, name: str) -> bool:
        """Without a wait; what is old is looked at again in a thread meanwhile."""
        entry = self._entries.get(name)
        seen = entry.seen if entry is not None else self._absent.get(name, -float("inf"))
        if time.monotonic() - seen >= self._refresh and not self._locks[hash(name) % _LOCKS].locked():
            threading.Thread(target=self._look_quietly, args=(name,), daemon=True, name="look-at-name").start()
        return entry is not None

    def all(self) -> Sequence[tuple[str, Found]]:
        """Sorted by name: one listing, and the records that changed since the last one. Raises BucketError or
        BucketDenied where there was no list yet."""
        with self._listing:
            if time.monotonic() - self._listed >= self._refresh:
                try:
                    self._list()
                except _NO_ANSWER as error:
                    if not self._was_listed:
                        raise
                    self._tell(error)
                    self._listed = time.monotonic() + OUTAGE_SECONDS
            return [(name, entry.found) for name, entry in sorted(self._entries.items())]

    def _list(self) -> None:
        began = time.monotonic()
        bucket = self._hasty if self._was_listed else self._bucket  # there is a list to fall back on
        listed = {name: info.etag for info in bucket.list(NAMES) if (name := name_of(info.key)) is not None}
        for gone in self._entries.keys() - listed.keys():
            if (entry := self._entries.get(gone)) is not None and entry.seen < began:
                self._drop(gone)
        changed = [name for name, etag in listed.items() if not self._has(name, etag)]
        with ThreadPoolExecutor(_READERS) as readers:
            for name, entry in zip(
                changed, readers.map(lambda name: self._read_listed(name, bucket), changed), strict=True
            ):
                if entry is not None:
                    self._keep(name, entry)
        self._listed, self._was_listed = time.monotonic(), True

    def _read_listed(self, name: str, bucket: Bucket) -> _Entry | None:
        """One that may not be read is broken, until the next look; the others are listed all the same."""
        try:
            return self._read(name, bucket)
        except BucketDenied as error:
            denied = SoftPromptError(str(error.strerror), param="file", code="store_denied")
            return _Entry("", denied, denied, -float("inf"))

    def _has(self, name: str, etag: Etag) -> bool:
        entry = self._entries.get(name)
        return entry is not None and entry.etag == etag

    def _look(self, name: str, known: _Entry | None, bucket: Bucket) -> _Entry | None:
        if known is not None:
            etag = bucket.etag(record_key(name))
            if etag == known.etag:
                return _Entry(known.etag, known.record, known.found, time.monotonic())
            if etag is None:
                self._drop(name)
                return None
        entry = self._read(name, bucket)
        if entry is None:
            self._drop(name)
            if len(self._absent) >= _MAX_ABSENT:
                self._absent.clear()
            self._absent[name] = time.monotonic()
        return entry

    def _read(self, name: str, bucket: Bucket) -> _Entry | None:
        """A record that arrives damaged is fetched again, in case it only was on its way."""
        if not is_name(name):
            refused = SoftPromptError(f"{record_key(name)} is no soft prompt's name", param="name", code="invalid_name")
            return _Entry("", refused, refused, time.monotonic())
        tries = max(_LEAST_TRIES, bucket.retries.tries)
        while True:
            read = bucket.read(record_key(name))
            if read is None:
                return None
            try:
                record = read_record(name, read[0])
                return _Entry(read[1], record, self._describe(record), time.monotonic())
            except SoftPromptError as error:
                tries -= 1
                if not tries:
                    return _Entry(read[1], error, error, time.monotonic())

    def _look_quietly(self, name: str) -> None:
        try:
            self.get(name)
        except OSError as error:
            self._tell(error)

    def _keep(self, name: str, entry: _Entry) -> _Entry:
        self._absent.pop(name, None)
        old = self._entries.get(name)
        self._entries[name] = entry
        if old is None or old.record != entry.record:
            self.changed_at = time.time_ns()
        if old is not None and isinstance(old.record, PromptRecord) and old.record != entry.record:
            self._on_gone(old.record)
        return entry

    def _drop(self, name: str) -> None:
        entry = self._entries.pop(name, None)
        if entry is not None:
            self.changed_at = time.time_ns()
            if isinstance(entry.record, PromptRecord):
                self._on_gone(entry.record)

    def _tell(self, error: OSError) -> None:
        """Once a minute: the bucket may be away for long."""
        if time.monotonic() - self._told > 60:
            self._told = time.monotonic()
            logger.warning("names are served as they were last seen: %s", error.strerror)
