"""Compressions of all servers on one bucket: any of them takes a job, one at a time, and goes on with a dead one's."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import secrets
import shutil
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import msgspec
from prometheus_client import CollectorRegistry

from softbatch.prompt_store.atomic_files import process_directory
from softbatch.prompt_store.manifest import ModelSpec, SoftPromptError
from softbatch.prompt_store.stores.bucket import BucketError
from softbatch.prompt_store.stores.object_store import ObjectStore
from softbatch.prompt_store.stores.prompt_record import unseal
from softbatch.server.compressions.job_lease import LEASE_SECONDS, JobLease, LeaseLost
from softbatch.server.compressions.job_places import JobPlaces
from softbatch.server.compressions.job_queue import MAX_ATTEMPTS, MAX_FINISHED
from softbatch.server.compressions.job_watch import watch
from softbatch.server.compressions.leased_run import LeasedRun, withdraw_preview
from softbatch.server.compressions.record import FINAL, Job, JobRecord
from softbatch.server.compressions.request import DIRECTORY, CompressionRequest, ModelChoice
from softbatch.server.compressions.shared_record import Seen, SharedRecord, SharedRecords, report_key, request_key
from softbatch.server.compressions.worker_messages import DoneMessage
from softbatch.server.request_failures import CompressionEnded, CompressionNotFound, CompressionsUnavailable

logger = logging.getLogger(__name__)
LOOK_SECONDS = 2.0


@dataclass
class _Known:
    """A job as it was last seen, and since when it has been so by this machine's clock."""

    seen: Seen
    since: float
    job: Job


class SharedCompressions:
    """Every server has the same jobs, at most a look apart, and may be asked about each."""

    def __init__(
        self,
        store: ObjectStore,
        spec: ModelSpec,
        registry: CollectorRegistry,
        is_draining: Callable[[], bool],
        choice: Callable[[], ModelChoice],
    ) -> None:
        self._store, self._spec, self._is_draining, self._choice = store, spec, is_draining, choice
        self._records = SharedRecords(store.bucket)
        self._root = store.root / DIRECTORY
        self._me = secrets.token_hex(8)
        self._known: dict[str, _Known] = {}
        self._places = JobPlaces(self._jobs, spec, registry, is_draining)
        self._run: LeasedRun | None = None
        self._running_id = ""
        self._looked = asyncio.Event()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[SharedCompressions]:
        """Take jobs until the end of the block; what is unfinished then is put back for others. Servers of one machine
        may share the copies, and a job that one puts back may begin on another at once: each has its own directory."""
        self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
        with process_directory(self._root, "server-") as self._root:
            async with self._looking_and_running():
                yield self

    @contextlib.asynccontextmanager
    async def _looking_and_running(self) -> AsyncIterator[None]:
        tasks = []
        if self._store.offers.jobs:
            tasks = [asyncio.create_task(self._keep_looking()), asyncio.create_task(self._keep_running())]
        else:
            logger.warning("no compressions on this server: %s", self._unavailable())
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    # --- for the routes -------------------------------------------------------------------------------------

    def list(self) -> Sequence[Job]:
        """Newest first. Raises CompressionsUnavailable where the bucket cannot keep jobs."""
        self._check_available()
        return [self._known[job_id].job for job_id in sorted(self._known, reverse=True)]

    def get(self, job_id: str) -> Job:
        """Raises CompressionNotFound."""
        self._check_available()
        known = self._known.get(job_id)
        if known is None:
            raise CompressionNotFound(job_id)
        return known.job

    def check_place(self, name: str) -> None:
        """Raises CompressionNameTaken, TooManyCompressions or CompressionsUnavailable."""
        self._check_available()
        self._places.check(name)

    async def create(self, request: CompressionRequest) -> Job:
        """Queue a checked request; when this returns, it is in the bucket. Raises what check_place does."""
        self._check_available()
        with self._places.reserved(request.name) as record:
            try:
                self._learn(await asyncio.to_thread(self._write_new, record, request))
            except OSError as error:
                logger.exception("a compression cannot be queued")
                message = f"the prompt store cannot be written: {error.strerror}"
                raise CompressionsUnavailable(message, code="store_unreachable") from error
        return self._known[record.id].job

    async def cancel(self, job: Job) -> None:
        """Returns when the job has ended. Raises CompressionEnded when it had ended otherwise."""
        while not job.is_final:
            with contextlib.suppress(OSError):
                await asyncio.to_thread(self._wish_cancelled, job.record.id)
                if self._run is not None and self._running_id == job.record.id:
                    self._run.kill()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(job.changed.wait(), LOOK_SECONDS)
        if job.record.status != "cancelled":
            raise CompressionEnded(job.record.status)

    def watch(self, job: Job) -> AsyncGenerator[Job, None]:
        return watch(job, self._is_draining)

    async def report(self, job: Job) -> Path | None:
        """Raises OSError."""
        if not job.report.is_file():
            await asyncio.to_thread(self._fetch_report, job)
        return job.report if job.report.is_file() else None

    # --- what all servers know ------------------------------------------------------------------------------

    def _jobs(self) -> Sequence[Job]:
        return [known.job for known in list(self._known.values())]

    def _check_available(self) -> None:
        if not self._store.offers.jobs:
            raise CompressionsUnavailable(self._unavailable(), code="compressions_unavailable")

    def _unavailable(self) -> str:
        if not self._store.offers.write:
            return f"{self._store.location} is read-only for this server"
        offers = {"If-None-Match": self._store.offers.create, "If-Match": self._store.offers.replace}
        missing = " and ".join(header for header, offered in offers.items() if not offered)
        return (
            f"{self._store.location} offers no conditional writes ({missing}), without which two servers might run one "
            "job; compress with `softbatch compress`, which registers in the same store"
        )

    async def _keep_looking(self) -> None:
        is_told = False
        while True:
            try:
                etags, fresh = await asyncio.to_thread(self._look)
                for gone in self._known.keys() - etags.keys():
                    if time.monotonic() - self._known[gone].since > LOOK_SECONDS:
                        del self._known[gone]
                for seen in fresh:
                    self._learn(seen)
                is_told = False
            except OSError as error:
                if not is_told:
                    logger.warning("compressions of other servers are not seen for now: %s", error.strerror)
                is_told = True
            except Exception:
                logger.exception("compressions cannot be looked at")
            self._looked.set()
            await asyncio.sleep(LOOK_SECONDS)

    def _look(self) -> tuple[dict[str, str], Sequence[Seen]]:
        etags, known = self._records.etags(), dict(self._known)
        changed = [job_id for job_id, etag in etags.items() if job_id not in known or known[job_id].seen.etag != etag]
        return etags, [seen for job_id in changed if (seen := self._records.read(job_id)) is not None]

    def _learn(self, seen: Seen) -> None:
        shared = seen.shared
        known = self._known.get(shared.record.id)
        if known is None:
            job = Job(shared.record, self._root / shared.record.id, shared.progress)
            self._known[shared.record.id] = _Known(seen, time.monotonic(), job)
            self._looked.set()
        elif shared.changes > known.seen.shared.changes:
            known.seen, known.since = seen, time.monotonic()
            known.job.record = shared.record
            if self._running_id != shared.record.id:  # which knows it sooner
                known.job.progress = shared.progress
            known.job.notify()

    def _write_new(self, record: JobRecord, request: CompressionRequest) -> Seen:
        content = msgspec.json.encode(request)
        self._store.bucket.write(request_key(record.id), content)
        seen = self._records.create(SharedRecord(record=record, request_sha256=hashlib.sha256(content).hexdigest()))
        if seen is None:
            raise BucketError(f"{record.id} is there already")
        return seen

    def _wish_cancelled(self, job_id: str) -> None:
        seen = self._records.read(job_id)
        if seen is None or seen.shared.staged is not None:  # then it has its name, or will have it
            return
        shared, known = seen.shared, self._known.get(job_id)
        is_alone = known is not None and known.seen.etag == seen.etag and self._is_free(known)
        if shared.record.status == "queued" or is_alone:  # no server has to hear of it
            if shared.preview is not None:
                wished = self._records.replace(seen, msgspec.structs.replace(shared, cancelled=True))
                if wished is None:
                    return
                seen, shared = wished, wished.shared
                withdraw_preview(self._store, shared)
            ended = msgspec.structs.replace(
                shared.record, status="cancelled", finished_at=int(time.time()), preview=None
            )
            shared = msgspec.structs.replace(shared, record=ended, cancelled=True, token=shared.token + 1, files={})
            if self._records.replace(seen, shared) is not None:
                self._clean(shared)
        elif not shared.cancelled:
            self._records.replace(seen, msgspec.structs.replace(shared, cancelled=True))

    def _fetch_report(self, job: Job) -> None:
        found = self._store.bucket.read(report_key(job.record.id))
        if found is not None:
            with contextlib.suppress(ValueError):
                page = unseal(found[0])
                job.report.parent.mkdir(parents=True, exist_ok=True)
                job.report.write_bytes(page)

    # --- the job that this server runs ----------------------------------------------------------------------

    async def _keep_running(self) -> None:
        while True:
            await self._looked.wait()
            self._looked.clear()
            for known in sorted(self._known.values(), key=lambda known: known.job.record.id):
                if self._is_free(known) and not self._is_draining():
                    try:
                        await self._take(known)
                    except OSError as error:
                        logger.warning("compression %s is not taken: %s", known.job.record.id, error.strerror)
                    except Exception:
                        logger.exception("compression %s failed here", known.job.record.id)

    def _is_free(self, known: _Known) -> bool:
        """Also a job whose holder is gone. One that was made for another model is for a server that runs it."""
        record = known.seen.shared.record
        if known.job.is_final or record.fingerprint != self._spec.fingerprint:
            return False
        return record.status == "queued" or time.monotonic() - known.since > LEASE_SECONDS

    async def _take(self, known: _Known) -> None:
        before = known.seen.shared.record
        record = msgspec.structs.replace(
            before,
            status="running",
            started_at=before.started_at or int(time.time()),
            attempts=before.attempts + (known.seen.shared.staged is None),
        )
        lease = await asyncio.to_thread(JobLease.take, self._records, known.seen, self._me, record)
        if lease is None:
            return
        self._learn(lease.seen)
        logger.info("compression %s of %s begins, attempt %d", record.id, record.name, record.attempts)
        self._run, self._running_id = LeasedRun(self._store, lease, known.job.directory, known.job.tell), record.id
        try:
            async with self._run.renewing():
                await self._carry_out(self._run, lease)
        except LeaseLost:  # and with it the request and the checkpoints: they are the next holder's
            logger.warning("compression %s is left to other servers", record.id)
            return
        except asyncio.CancelledError:
            with contextlib.suppress(LeaseLost, OSError):
                left = await asyncio.shield(asyncio.to_thread(self._run.put_back))
                if left.record.status in FINAL:
                    await asyncio.to_thread(self._clean, left)
            raise
        finally:
            self._run, self._running_id = None, ""
            await asyncio.to_thread(shutil.rmtree, known.job.directory, True)
        self._learn(lease.seen)
        await asyncio.to_thread(self._clean, lease.shared)

    async def _carry_out(self, run: LeasedRun, lease: JobLease) -> None:
        """To its end, which is then written down. Raises LeaseLost, or OSError while the bucket does not answer."""
        shared = lease.shared
        if shared.staged is not None:  # its name may be given already, whatever was wished since
            await self._publish(run, partial(run.publish_staged, shared.staged))
        elif shared.cancelled:
            await asyncio.to_thread(run.cancel)
        elif shared.record.attempts > MAX_ATTEMPTS:
            message = f"the server ended {shared.record.attempts - 1} times while this job ran"
            await asyncio.to_thread(run.fail, "interrupted", message)
        else:
            result = await run.run(self._choice())
            if lease.shared.cancelled or (await asyncio.to_thread(lease.write)).cancelled:
                await asyncio.to_thread(run.cancel)
            elif isinstance(result, DoneMessage):
                await self._publish(run, partial(run.publish, result))
            else:
                await asyncio.to_thread(run.fail, result.code, result.message, result.param)
        ended = lease.shared.record
        logger.info("compression %s of %s: %s", ended.id, ended.name, ended.status)

    async def _publish(self, run: LeasedRun, publish: Callable[[], SharedRecord]) -> None:
        try:
            await asyncio.to_thread(publish)
        except SoftPromptError as error:
            message = f"the soft prompt cannot be registered: {error}"
            await asyncio.to_thread(run.fail, error.code, message, error.param)

    def _clean(self, shared: SharedRecord) -> None:
        """Behind the end of a job, and of the oldest of too many. What is left behind by an error harms nobody."""
        with contextlib.suppress(OSError):
            self._records.clean(shared.record.id)
            finished = sorted(job_id for job_id, known in self._known.items() if known.job.is_final)
            for old in finished[: max(0, len(finished) - MAX_FINISHED)]:
                self._records.delete(old)
