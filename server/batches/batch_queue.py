"""Batches on the server: their lines are answered a few at a time behind everything else, and survive a restart."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from softbatch.prompt_store.atomic_files import lock
from softbatch.server.batches.batch_files import BatchFiles
from softbatch.server.batches.batch_record import BatchRecord
from softbatch.server.batches.batch_run import BatchRun
from softbatch.server.batches.ledger import Ledger
from softbatch.server.batches.line_answer import Ask
from softbatch.server.observability.metrics import Metrics
from softbatch.server.request_failures import (
    BatchesUnavailable,
    BatchNotRunning,
    TooManyBatches,
    UnknownBatch,
    UnknownBatchFile,
)

logger = logging.getLogger(__name__)
LOCK = "lock"
DATABASE = "batches.sqlite3"
# All three of one API key, so that nobody takes the room of others.
MAX_UNFINISHED = 256
MAX_BATCHES = 10_000
MAX_FILES = 10_000
SECONDS_BETWEEN_LOOKS = 1.0
SECONDS_BETWEEN_SWEEPS = 60.0
# As long as OpenAI keeps the files of batches.
KEPT_SECONDS = 30 * 86_400


@dataclass(frozen=True)
class BatchLimits:
    """Lines of a batch, bytes of a file and of a line, and lines that are asked at once."""

    max_lines: int
    max_file_bytes: int
    concurrency: int
    max_line_bytes: int = 8 << 20  # as many as a request's body


class BatchQueue:
    """Owns its directory while it holds the lock there: of the servers that share one, one runs the batches, and
    another takes over when that is gone.

    No batch is run before `begin` has said how a line is asked.
    """

    def __init__(self, root: Path, limits: BatchLimits, metrics: Metrics, is_draining: Callable[[], bool]) -> None:
        self.limits = limits
        self._root = root
        self._metrics = metrics
        self._is_draining = is_draining
        self._lock: IO[bytes] | None = None
        self._ledger: Ledger | None = None
        self._files: BatchFiles | None = None
        self._complaint = "another server runs the batches of this directory; ask that one"
        self._code = "batches_elsewhere"
        self._ask: asyncio.Future[Ask] | None = None
        self._places = asyncio.Semaphore(limits.concurrency)
        self._runs: dict[str, BatchRun] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        metrics.batches_unfinished.set_function(lambda: len(self._runs))
        metrics.batch_lines_left.set_function(lambda: sum(run.record.left for run in list(self._runs.values())))

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[BatchQueue]:
        """Run batches until the end of the block; what is unfinished then goes on with the next server."""
        self._ask = asyncio.get_running_loop().create_future()
        await asyncio.to_thread(self._try_lock)
        self._start(self._run())
        try:
            yield self
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            if self._ledger is not None:
                self._ledger.close()
            if self._lock is not None:
                self._lock.close()

    def begin(self, ask: Ask) -> None:
        """From now on there are routes that answer."""
        if self._ask is not None and not self._ask.done():
            self._ask.set_result(ask)

    # --- for the routes -------------------------------------------------------------------------------------

    @property
    def ledger(self) -> Ledger:
        """Raises BatchesUnavailable where another server runs the batches, or the disk does not let this one."""
        if self._ledger is None:
            raise BatchesUnavailable(self._complaint, code=self._code)
        return self._ledger

    @property
    def files(self) -> BatchFiles:
        """Raises BatchesUnavailable."""
        if self._files is None:
            raise BatchesUnavailable(self._complaint, code=self._code)
        return self._files

    def check_open(self) -> None:
        """Whether anything new is taken. Raises BatchesUnavailable."""
        _ = self.ledger
        if self._is_draining():
            raise BatchesUnavailable("the server is shutting down; try again in a moment")

    async def create(self, record: BatchRecord) -> None:
        """When this returns, the batch is on disk. Raises BatchesUnavailable, TooManyBatches or UnknownBatchFile."""
        self.check_open()
        if sum(run.record.owner == record.owner for run in self._runs.values()) >= MAX_UNFINISHED:
            raise TooManyBatches(f"{MAX_UNFINISHED} batches are unfinished; try again when one has ended")
        if await asyncio.to_thread(self.ledger.num_batches, record.owner) >= MAX_BATCHES:
            days = 2 * KEPT_SECONDS // 86_400
            raise TooManyBatches(f"{MAX_BATCHES} batches were made in the last {days} days; more are not remembered")
        if not await asyncio.to_thread(self.ledger.add_batch, record):
            raise UnknownBatchFile(record.input_file_id, param="input_file_id")
        self._take_up(record)

    async def cancel(self, batch_id: str, owner: str | None) -> BatchRecord:
        """Its lines are no longer asked; what is answered stays. Raises UnknownBatch or BatchNotRunning."""
        found = await asyncio.to_thread(self.ledger.batch, batch_id, owner)
        if found is None:
            raise UnknownBatch(batch_id)
        run = self._runs.get(batch_id)
        if run is None:
            raise BatchNotRunning(found.status)
        await run.cancel()
        return run.record

    # --- the queue ------------------------------------------------------------------------------------------

    def _try_lock(self) -> None:
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            file = (self._root / LOCK).open("wb")
        except OSError as error:
            self._complain(f"{self._root} cannot be written ({error.strerror})", "store_read_only")
            return
        try:
            lock(file)
        except OSError:
            file.close()
            return
        try:
            ledger = Ledger(self._root / DATABASE)
            files = BatchFiles(self._root / "files")
            files.remove_others(ledger.file_ids())
        except (BatchesUnavailable, OSError) as error:
            file.close()
            self._complain(str(error), "disk_error")
            return
        self._ledger, self._files, self._lock = ledger, files, file

    def _complain(self, reason: str, code: str) -> None:
        complaint = f"there are no batches on this server: {reason}"
        if complaint != self._complaint:  # said once
            logger.warning("%s", complaint)
        self._complaint, self._code = complaint, code

    async def _run(self) -> None:
        while self._ledger is None:
            await asyncio.sleep(SECONDS_BETWEEN_LOOKS)
            await asyncio.to_thread(self._try_lock)
        for record in await asyncio.to_thread(self._ledger.unfinished):
            self._take_up(record)
        while True:
            with contextlib.suppress(BatchesUnavailable, OSError):
                await asyncio.to_thread(_sweep, self.ledger, self.files)
            await asyncio.sleep(SECONDS_BETWEEN_SWEEPS)

    def _take_up(self, record: BatchRecord) -> None:
        if record.id not in self._runs:
            run = self._runs[record.id] = BatchRun(
                record, self.ledger, self.files, self.limits.max_lines, self.limits.max_line_bytes
            )
            self._start(self._finish(run))

    async def _finish(self, run: BatchRun) -> None:
        assert self._ask is not None
        try:
            await run.to_its_end(await asyncio.shield(self._ask), self._places, self._count)
        except Exception:
            logger.exception("batch %s is left as it is until the next start", run.record.id)
        finally:
            del self._runs[run.record.id]

    def _count(self, has_succeeded: bool) -> None:
        self._metrics.batch_lines.labels("completed" if has_succeeded else "failed").inc()

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _sweep(ledger: Ledger, files: BatchFiles) -> None:
    """Delete files whose time is over, and forget batches as old as they would be."""
    now = int(time.time())
    for file_id in ledger.expired_files(now):
        if ledger.remove_file(file_id) is None:
            files.remove(file_id)
    ledger.forget_old(now - 2 * KEPT_SECONDS)
