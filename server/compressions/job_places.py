"""Which compressions are taken, whoever keeps the jobs: a name at most once, and so many at a time."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Iterator
from functools import partial

from prometheus_client import CollectorRegistry, Gauge

from softbatch.prompt_store.manifest import ModelSpec
from softbatch.server.compressions.record import Job, JobRecord, Status, new_id
from softbatch.server.request_failures import CompressionNameTaken, CompressionsUnavailable, TooManyCompressions

MAX_QUEUED = 8
STATUSES: tuple[Status, ...] = ("queued", "running", "succeeded", "failed", "cancelled")


class JobPlaces:
    """Owns the names of jobs that are being written down; `jobs` are those that are."""

    def __init__(
        self,
        jobs: Callable[[], Collection[Job]],
        spec: ModelSpec,
        registry: CollectorRegistry,
        is_draining: Callable[[], bool],
    ) -> None:
        self._jobs, self._spec, self._is_draining = jobs, spec, is_draining
        self._reserved: set[str] = set()
        gauge = Gauge("softbatch_compression_jobs", "Compression jobs.", ["status"], registry=registry)
        for status in STATUSES:
            gauge.labels(status).set_function(partial(self.count, status))

    def count(self, status: Status) -> int:
        return sum(job.record.status == status for job in self._jobs())

    def check(self, name: str) -> None:
        """Raises CompressionNameTaken, TooManyCompressions or CompressionsUnavailable."""
        if self._is_draining():
            raise CompressionsUnavailable("the server is shutting down; try again in a moment")
        if name in self._reserved or any(job.record.name == name for job in self._jobs() if not job.is_final):
            raise CompressionNameTaken(name)
        if len(self._reserved) + self.count("queued") >= MAX_QUEUED:
            raise TooManyCompressions(MAX_QUEUED)

    @contextlib.contextmanager
    def reserved(self, name: str) -> Iterator[JobRecord]:
        """A new job's record, and its place until the end of the block. Raises what `check` does."""
        self.check(name)
        self._reserved.add(name)
        now = int(time.time())
        try:
            yield JobRecord(id=new_id(), name=name, status="queued", created_at=now, fingerprint=self._spec.fingerprint)
        finally:
            self._reserved.discard(name)
