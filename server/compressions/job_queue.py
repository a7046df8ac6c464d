"""Compressions on the server: one at a time in a process of its own, the others in a queue that survives a restart."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import IO, Any

import msgspec
from prometheus_client import CollectorRegistry

from softbatch.prompt_store.atomic_files import lock, sync
from softbatch.prompt_store.manifest import ModelSpec, SoftPromptError
from softbatch.prompt_store.stores.store import NameChanged, NameTaken, SoftPromptStore
from softbatch.server.compressions.job_places import JobPlaces
from softbatch.server.compressions.job_watch import SECONDS_BETWEEN_LOOKS, watch
from softbatch.server.compressions.record import FINAL, Job, JobError, JobRecord, Status, load_jobs, save
from softbatch.server.compressions.request import DIRECTORY, LOCK, CompressionRequest
from softbatch.server.compressions.result import find_finished, find_preview, register, sha256_of_file, withdraw
from softbatch.server.compressions.run_directory import PREVIEW, RESULT, discard
from softbatch.server.compressions.worker_messages import DoneMessage, FailedMessage
from softbatch.server.compressions.worker_process import WorkerProcess
from softbatch.server.request_failures import CompressionEnded, CompressionNotFound, CompressionsUnavailable

logger = logging.getLogger(__name__)
MAX_FINISHED = 100
# A job that took the server down with it this often is not tried again.
MAX_ATTEMPTS = 3


class CompressionJobs:
    """Owns `<store>/.compressions` while it holds the lock there: one server of a store runs its compressions, and
    another one takes over when that is gone."""

    def __init__(
        self, store: SoftPromptStore, spec: ModelSpec, registry: CollectorRegistry, is_draining: Callable[[], bool]
    ) -> None:
        self._store: SoftPromptStore = store
        self._spec = spec
        self._is_draining = is_draining
        self._root = store.root / DIRECTORY
        self._jobs: dict[str, Job] = {}
        self._places = JobPlaces(lambda: list(self._jobs.values()), spec, registry, is_draining)
        self._lock: IO[bytes] | None = None
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._worker: WorkerProcess | None = None

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[CompressionJobs]:
        """Run jobs until the end of the block; what is unfinished then goes on with the next server."""
        self._try_lock()
        self._task = asyncio.create_task(self._run())
        try:
            yield self
        finally:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            if self._lock is not None:
                self._lock.close()

    # --- for the routes -------------------------------------------------------------------------------------

    def list(self) -> Sequence[Job]:
        """Newest first. Raises CompressionsUnavailable where another server runs the compressions."""
        self._check_owner()
        return list(self._jobs.values())[::-1]

    def get(self, job_id: str) -> Job:
        """Raises CompressionNotFound."""
        self._check_owner()
        job = self._jobs.get(job_id)
        if job is None:
            raise CompressionNotFound(job_id)
        return job

    def check_place(self, name: str) -> None:
        """Raises CompressionNameTaken, TooManyCompressions or CompressionsUnavailable."""
        self._check_owner()
        self._places.check(name)

    async def create(self, request: CompressionRequest) -> Job:
        """Queue a checked request; when this returns, it is on disk. Raises what check_place does."""
        self._check_owner()
        with self._places.reserved(request.name) as record:
            job = Job(record, self._root / record.id)
            try:
                await asyncio.to_thread(_write_new, job, request)
            except OSError as error:
                logger.exception("a compression cannot be queued")
                raise CompressionsUnavailable(
                    f"the server cannot write its files: {error.strerror}", code="disk_error"
                ) from error
            self._jobs[record.id] = job
        self._wake.set()
        return job

    async def cancel(self, job: Job) -> None:
        """Returns when the job has ended. Raises CompressionEnded when it had ended otherwise."""
        if not job.is_final:
            job.cancelled = True
            if job.record.status == "queued":
                await self._finish(job, "cancelled")
            elif self._worker is not None:
                self._worker.kill()
        while not job.is_final:
            await job.changed.wait()
        if job.record.status != "cancelled":
            raise CompressionEnded(job.record.status)

    def watch(self, job: Job) -> AsyncGenerator[Job, None]:
        return watch(job, self._is_draining)

    async def report(self, job: Job) -> Path | None:
        return job.report if await asyncio.to_thread(job.report.is_file) else None

    # --- the queue ------------------------------------------------------------------------------------------

    def _check_owner(self) -> None:
        if self._lock is None:
            message = "another server on this prompt store runs its compressions; ask that one"
            raise CompressionsUnavailable(message, code="compressions_elsewhere")

    def _try_lock(self) -> None:
        try:
            self._root.mkdir(exist_ok=True)
            file = (self._root / LOCK).open("wb")
        except OSError as error:
            if self._task is None:  # said once, at the start
                logger.warning("no compressions on this server: %s cannot be written (%s)", self._root, error.strerror)
            return
        try:
            lock(file)
        except OSError:
            file.close()
            return
        self._lock = file
        self._jobs = {job.record.id: job for job in load_jobs(self._root, self._spec.fingerprint)}
        for job in self._jobs.values():
            if not job.is_final:
                job.record.status = "queued"  # whoever cancels it before it is taken up must not wait for a worker

    async def _run(self) -> None:
        while self._lock is None:
            await asyncio.sleep(SECONDS_BETWEEN_LOOKS)
            self._try_lock()
        for job in list(self._jobs.values()):
            await self._take_up(job)
        while True:
            self._wake.clear()
            queued = (job for job in self._jobs.values() if job.record.status == "queued" and not job.cancelled)
            following = next(queued, None)
            if following is None:
                await self._wake.wait()
                continue
            try:
                await self._run_job(following)
            except Exception:
                logger.exception("compression %s failed", following.record.id)
                await self._fail(following, "internal_error", "internal error; see the server's log")

    async def _take_up(self, job: Job) -> None:
        """A job of an earlier server: queue it again, or say why that cannot be."""
        record = job.record
        if job.is_final:
            await asyncio.to_thread(_clean, self._store, job.directory, record)
        elif not (job.directory / "request.json").exists():
            await self._fail(job, "unreadable", "the job's request on disk is gone; send the job again")
        elif record.fingerprint != self._spec.fingerprint:
            await self._fail(job, "model_changed", "the server was restarted with another model; send the job again")
        elif record.attempts >= MAX_ATTEMPTS:
            await self._fail(job, "interrupted", f"the server ended {record.attempts} times while this job ran")
        else:
            logger.info("compression %s of %s goes on", record.id, record.name)

    async def _run_job(self, job: Job) -> None:
        record = job.record
        record.status = "running"
        record.started_at = record.started_at or int(time.time())
        record.attempts += 1
        await asyncio.to_thread(save, job.directory, record)
        job.notify()
        logger.info("compression %s of %s begins", record.id, record.name)

        previews: list[asyncio.Task[FailedMessage | None]] = []
        self._worker = worker = WorkerProcess(
            job.directory,
            job.tell,
            lambda: previews.append(asyncio.create_task(self._register_preview(job, worker))),
        )
        try:
            # Cancelled while its record was being written, it ends as soon as it has begun.
            if job.cancelled:
                worker.kill()
            result = await worker.run()
            for refusal in await asyncio.gather(*previews):
                result = refusal or result
        finally:
            self._worker = None
        if job.cancelled:
            await self._finish(job, "cancelled")
        elif isinstance(result, DoneMessage):
            await self._register(job, result)
        else:
            await self._fail(job, result.code, result.message, result.param)

    async def _register_preview(self, job: Job, worker: WorkerProcess) -> FailedMessage | None:
        """While its worker trains on. Whatever refuses the preview's name would refuse the trained one's: then the
        worker ends, and this is why."""
        if job.record.preview is not None or job.cancelled:
            return None

        def add() -> str:
            preview = find_preview(job.directory)
            if preview is None:
                raise FileNotFoundError
            return register(self._store, job.record.name, preview).sha256

        try:
            job.record.preview = await asyncio.to_thread(add)
            await asyncio.to_thread(save, job.directory, job.record)
        except SoftPromptError as error:
            worker.kill()
            return FailedMessage(error.code, f"the soft prompt cannot be registered: {error}", error.param)
        except OSError:
            logger.exception("the preview of compression %s cannot be registered", job.record.id)
        job.notify()
        return None

    async def _register(self, job: Job, done: DoneMessage) -> None:
        def add() -> None:
            finished = find_finished(job.directory)
            if finished is None:
                raise FileNotFoundError
            register(self._store, job.record.name, finished, job.record.preview)

        try:
            await asyncio.to_thread(add)
        except (NameChanged, NameTaken) as error:
            job.record.preview = None  # it is not there any more, or never was
            kept = f"the trained one is in {job.directory / RESULT}: `softbatch prompts import` registers it"
            await self._fail(job, error.code, f"the soft prompt cannot be registered: {error}; {kept}", error.param)
            return
        except SoftPromptError as error:
            await self._fail(job, error.code, f"the soft prompt cannot be registered: {error}", error.param)
            return
        except OSError:
            logger.exception("compression %s cannot be registered", job.record.id)
            await self._fail(job, "disk_error", "the soft prompt cannot be written to the store; see the server's log")
            return
        await self._finish(job, "succeeded", soft_prompt=job.record.name, fidelity=done.fidelity, preview=None)

    async def _fail(self, job: Job, code: str, message: str, param: str | None = None) -> None:
        if not job.is_ending:
            logger.error("compression %s failed: %s", job.record.id, message)
        if job.record.preview is not None:
            message += f"; its preview stays registered as {job.record.name}, delete it before you try again"
        await self._finish(job, "failed", error=JobError(code, message, param))

    async def _finish(self, job: Job, status: Status, **fields: Any) -> None:
        """Whoever is told of the end finds it on disk: it is written down first. Of two ends the first counts."""
        if job.is_ending:
            return
        job.is_ending = True
        try:
            await self._end(job, status, **fields)
        finally:
            job.is_ending = job.is_final  # else somebody else may end it yet

    async def _end(self, job: Job, status: Status, **fields: Any) -> None:
        ended = msgspec.structs.replace(job.record, status=status, finished_at=int(time.time()), **fields)
        try:
            await asyncio.to_thread(_write_end, self._store, job, ended)
        except OSError:
            logger.exception("the end of compression %s cannot be written down", ended.id)
        job.record = ended
        job.notify()
        logger.info("compression %s of %s: %s", ended.id, ended.name, status)
        finished = [other for other in self._jobs.values() if other.record.status in FINAL]
        for old in finished[: max(0, len(finished) - MAX_FINISHED)]:
            del self._jobs[old.record.id]
            await asyncio.to_thread(shutil.rmtree, old.directory, True)


def _write_new(job: Job, request: CompressionRequest) -> None:
    """The record last: with it the job exists."""
    job.directory.mkdir(parents=True)
    path = job.directory / "request.json"
    path.write_bytes(msgspec.json.encode(request))
    sync(path)
    save(job.directory, job.record)
    sync(job.directory.parent)


def _write_end(store: SoftPromptStore, job: Job, record: JobRecord) -> None:
    save(job.directory, record)
    _clean(store, job.directory, record)


def _clean(store: SoftPromptStore, directory: Path, record: JobRecord) -> None:
    """Delete what only a resumed run would need, the preview of what was cancelled too; a result that did not get its
    name stays. Once more does no harm."""
    preview = record.preview or sha256_of_file(directory / PREVIEW)
    if record.status == "cancelled" and preview is not None:
        withdraw(store, record.name, preview)
    has_no_name = record.error is not None and record.error.code in (NameChanged.CODE, NameTaken.CODE)
    discard(directory, but_result=has_no_name and (directory / RESULT).exists())
    (directory / "request.json").unlink(missing_ok=True)
    if record.status == "cancelled" and record.preview is not None:
        record.preview = None
        save(directory, record)
