"""The right to run one job: held by one server at a time, and lost by whoever does not renew it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import msgspec

from softbatch.prompt_store.stores.prompt_record import PromptRecord
from softbatch.server.compressions.record import FINAL, JobRecord
from softbatch.server.compressions.shared_record import SavedFile, Seen, SharedRecord, SharedRecords

# A lease that nobody renewed for so long, by the clock of whoever looks, is free. A holder that could not renew it for
# two thirds of that gives up by its own clock: neither needs to know what time the other has.
LEASE_SECONDS = 15.0
BEAT_SECONDS = 3.0
# For one try to renew it: another has time yet before the holder would give up.
RENEW_SECONDS = 4.0


class LeaseLost(Exception):
    """Another server has the job by now, or may have it."""


class JobLease:
    """Every write names the record that it replaces, so that none of an overtaken holder happens. `token` is of
    this holding alone. Thread-safe; blocks."""

    def __init__(self, records: SharedRecords, seen: Seen) -> None:
        self._records, self._seen = records, seen
        self._guard = threading.RLock()
        self._renewed = time.monotonic()
        self._is_over = False
        self.token = seen.shared.token

    @classmethod
    def take(cls, records: SharedRecords, seen: Seen, holder: str, record: JobRecord) -> JobLease | None:
        """None where another server was faster."""
        wanted = msgspec.structs.replace(seen.shared, record=record, token=seen.shared.token + 1, holder=holder)
        taken = records.replace(seen, wanted)
        return None if taken is None else cls(records, taken)

    @property
    def seen(self) -> Seen:
        return self._seen

    @property
    def shared(self) -> SharedRecord:
        return self._seen.shared

    @property
    def is_safe(self) -> bool:
        """Whether nobody can have taken it yet."""
        return not self._is_over and time.monotonic() - self._renewed < LEASE_SECONDS * 2 / 3

    def write(self, **changes: Any) -> SharedRecord:
        """Change these fields, which renews the lease. Raises LeaseLost, or BucketError when nothing is known."""
        return self.change(lambda shared: msgspec.structs.replace(shared, **changes))

    def may_name(self, staged: PromptRecord) -> bool:
        """Whether the record may say so, by a write whose answer was lost. False only where it certainly does not."""
        try:
            found = self._records.read(self.shared.record.id)
        except OSError:
            return True
        return found is None or staged in (found.shared.preview, found.shared.staged)

    def give_back(self, files: dict[str, SavedFile]) -> SharedRecord:
        """For others to go on with `files` at once, unless the job has come to its end. Nothing is written after it,
        whatever a thread may still be about to write. Raises like `write`."""

        def queued(shared: SharedRecord) -> SharedRecord:
            if shared.record.status in FINAL:
                return shared
            record = msgspec.structs.replace(shared.record, status="queued")
            return msgspec.structs.replace(shared, record=record, holder="", files=files)

        with self._guard:
            shared = self.change(queued)
            self._is_over = True
            return shared

    def renew(self, make: Callable[[SharedRecord], SharedRecord]) -> SharedRecord:
        """`change`, tried once, and given up in time for the next try."""
        return self.change(make, SharedRecords(self._records.bucket.hasty(seconds=RENEW_SECONDS)))

    def change(
        self, make: Callable[[SharedRecord], SharedRecord], records: SharedRecords | None = None
    ) -> SharedRecord:
        records = records or self._records
        with self._guard:
            if self._is_over:
                raise LeaseLost
            while True:
                began = time.monotonic()
                written = records.replace(self._seen, make(self._seen.shared))
                if written is not None:
                    self._seen, self._renewed = written, began
                    return written.shared
                found = records.read(self._seen.shared.record.id)
                if found is None or found.shared.token != self.token or found.shared.holder != self.shared.holder:
                    raise LeaseLost
                self._seen = found  # somebody wishes it to be cancelled
