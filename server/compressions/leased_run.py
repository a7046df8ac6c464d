"""One run of a job by the server that holds its lease: from the bucket to the worker and back."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import shutil
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from softbatch.prompt_store.manifest import SoftPromptError
from softbatch.prompt_store.stores.object_store import ObjectStore, StagedPrompt
from softbatch.prompt_store.stores.prompt_record import PromptRecord, seal
from softbatch.prompt_store.stores.store import NameChanged, NameTaken
from softbatch.server.compressions.job_lease import BEAT_SECONDS, JobLease, LeaseLost
from softbatch.server.compressions.record import JobError, JobRecord
from softbatch.server.compressions.request import CompressionRequest, ModelChoice
from softbatch.server.compressions.result import find_finished, find_preview, withdraw
from softbatch.server.compressions.shared_record import SavedFile, SharedRecord, report_key, request_key, result_key
from softbatch.server.compressions.work_snapshot import WorkSnapshots, restore
from softbatch.server.compressions.worker_messages import DoneMessage, FailedMessage, ProgressMessage
from softbatch.server.compressions.worker_process import WorkerProcess

logger = logging.getLogger(__name__)


class LeasedRun:
    """Owns the job's directory while it runs. All of it may raise LeaseLost."""

    def __init__(
        self,
        store: ObjectStore,
        lease: JobLease,
        directory: Path,
        tell: Callable[[ProgressMessage], None] = lambda progress: None,
    ) -> None:
        """`tell` hears of progress at once, other servers whenever the lease is renewed."""
        self._store, self._lease, self._directory, self._tell = store, lease, directory, tell
        self._id = lease.shared.record.id
        self._snapshots = WorkSnapshots(store.bucket, self._id, lease.token, directory)
        self._progress: ProgressMessage | None = None
        self._files = lease.shared.files
        self._unneeded: asyncio.Queue[set[SavedFile]] = asyncio.Queue()
        # Of its own: while the bucket is slow, others keep all threads of the process waiting.
        self._renewer = ThreadPoolExecutor(1, "renew-lease")
        self._lost = self._is_kept = False
        self._worker: WorkerProcess | None = None
        self._previews: list[asyncio.Task[FailedMessage | None]] = []

    def kill(self) -> None:
        """End the worker, if there is one; `run` then returns."""
        if self._worker is not None:
            self._worker.kill()

    async def run(self, choice: ModelChoice) -> DoneMessage | FailedMessage:
        """Its end, with the lease still held. Raises LeaseLost, or OSError."""
        if not await asyncio.to_thread(self._prepare, choice):
            return FailedMessage("unreadable", "the job's request in the bucket is gone or damaged; send the job again")
        if self._lease.shared.preview is not None and (refusal := await self._register_preview()):
            return refusal
        self._worker = WorkerProcess(self._directory, self._on_progress, self._on_preview)
        if self._lost:
            raise LeaseLost
        result = await self._worker.run()
        for refusal in await asyncio.gather(*self._previews):
            result = refusal or result
        if self._lost:
            raise LeaseLost
        return result

    @contextlib.asynccontextmanager
    async def renewing(self) -> AsyncIterator[None]:
        """The lease is kept until the end of the block, or `kill` is called."""
        tasks = [asyncio.create_task(keep()) for keep in (self._beat, self._save, self._tidy, self._guard)]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._renewer.shutdown(wait=False)

    def _on_progress(self, progress: ProgressMessage) -> None:
        self._progress = progress
        self._tell(progress)

    def _on_preview(self) -> None:
        self._previews.append(asyncio.create_task(self._register_preview()))

    async def _register_preview(self) -> FailedMessage | None:
        """While the worker trains on. Whatever refuses the preview's name would refuse the trained one's: then the
        worker ends, and this is why."""
        try:
            await asyncio.to_thread(self.publish_preview)
        except SoftPromptError as error:
            self.kill()
            return FailedMessage(error.code, f"the soft prompt cannot be registered: {error}", error.param)
        except LeaseLost:
            self._give_up()
        except OSError as error:  # `publish` tries again
            logger.warning("the preview of compression %s is not registered: %s", self._id, error.strerror)
        return None

    def _prepare(self, choice: ModelChoice) -> bool:
        """The request, with the model as this machine has it, and what an earlier run has left."""
        shutil.rmtree(self._directory, ignore_errors=True)
        self._directory.mkdir(parents=True)
        found = self._store.bucket.read(request_key(self._id))
        if found is None or hashlib.sha256(found[0]).hexdigest() != self._lease.shared.request_sha256:
            return False
        request = msgspec.json.decode(found[0], type=CompressionRequest)
        wants_preview = request.preview and self._lease.shared.preview is None  # another server has made it
        request = msgspec.structs.replace(request, choice=choice, store=self._store.location, preview=wants_preview)
        (self._directory / "request.json").write_bytes(msgspec.json.encode(request))
        if restore(self._store.bucket, self._lease.shared.files, self._directory):
            logger.info("compression %s goes on from what another server did", self._id)
        return True

    async def _beat(self) -> None:
        """Renew the lease, with the progress and the files that the run would go on from."""
        written, pause = self._files, BEAT_SECONDS
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(pause)
            kept, pause = self._files, BEAT_SECONDS
            try:
                renewed = partial(_renewed, self._progress, kept)
                shared = await loop.run_in_executor(self._renewer, self._lease.renew, renewed)
                if shared.cancelled:
                    self.kill()
                self._unneeded.put_nowait(set(written.values()) - set(kept.values()) - set(self._files.values()))
                written = kept
            except LeaseLost:
                self._give_up()
            except Exception as error:  # `_guard` ends the worker in time
                pause = BEAT_SECONDS / 6
                logger.warning("the lease on compression %s is not renewed: %s", self._id, error)

    async def _tidy(self) -> None:
        """Delete what no record names any more, while the lease is renewed."""
        while True:
            old = await self._unneeded.get()
            try:
                await asyncio.to_thread(self._snapshots.discard, old)
            except Exception as error:  # the end of the job takes it away
                logger.warning("old files of compression %s are not deleted: %s", self._id, error)

    async def _guard(self) -> None:
        """However long the bucket takes to answer."""
        while True:
            await asyncio.sleep(BEAT_SECONDS / 6)
            if not self._lease.is_safe:
                return self._give_up()

    def _give_up(self) -> None:
        logger.warning("compression %s may be another server's by now: its worker here ends", self._id)
        self._lost = True
        self.kill()

    async def _save(self) -> None:
        while True:
            await asyncio.sleep(BEAT_SECONDS / 2)
            try:
                saved = await asyncio.to_thread(self._snapshots.save)
            except Exception as error:
                logger.warning("compression %s is not saved: %s", self._id, error)
                continue
            if saved is not None:
                self._files = saved

    def publish_preview(self) -> None:
        """As `publish` does it: that it will have the name is written first. Raises like it."""
        if self._lease.shared.preview is None:
            found = find_preview(self._directory)
            if found is None:
                return
            staged = self._store.stage(self._lease.shared.record.name, found.prompt, kept=found.kept)
            self._promise(staged.record, preview=staged.record)
        self._name_preview()

    def _promise(self, promised: PromptRecord, /, **changes: Any) -> None:
        """Write down that it will have its name. Where no answer came it may be written: its objects stay then, and
        `remove_stale` finds them if no record names them. Raises like `JobLease.write`."""
        try:
            self._lease.write(**changes)
        except LeaseLost:
            if not self._lease.may_name(promised):
                self._store.discard(promised)
            raise

    def _name_preview(self) -> None:
        """Also what another server has written. One whose objects are gone stays without a name, which is then free for
        the trained one."""
        preview = self._lease.shared.preview
        if preview is None or self._lease.shared.record.preview is not None:
            return
        if not self._lease.is_safe:
            self._lease.write()
        try:
            if self._store.is_whole(preview):
                self._store.publish(StagedPrompt(self._store.describe(preview), preview))
            elif self._store.is_free(preview.name):
                self._lease.write(preview=None)
                return
        except NameTaken:
            self._lease.write(preview=None)  # first: nobody goes on with objects that are gone
            self._store.discard(preview)
            raise
        self._lease.change(
            lambda shared: msgspec.structs.replace(
                shared, record=msgspec.structs.replace(shared.record, preview=preview.sha256)
            )
        )

    def publish(self, done: DoneMessage) -> SharedRecord:
        """Give the result its name. That it will have it is written first, by whoever holds the lease: one that has
        lost it gets no further. Raises LeaseLost, SoftPromptError or OSError."""
        finished = find_finished(self._directory)
        if finished is None:
            raise FileNotFoundError(f"{self._directory} holds no result")
        self._name_preview()
        report = self._directory / "report" / "report.html"
        with contextlib.suppress(FileNotFoundError):
            self._store.bucket.write(report_key(self._id), seal(report.read_bytes()))
        record, preview = self._lease.shared.record, self._lease.shared.preview
        try:
            staged = self._store.stage(record.name, finished.prompt, kept=finished.kept, previous=preview).record
        except NameTaken:
            self._keep(finished.prompt)
            raise
        record = msgspec.structs.replace(record, fidelity=done.fidelity)
        self._promise(staged, record=record, staged=staged)
        return self.publish_staged(staged)

    def publish_staged(self, staged: PromptRecord) -> SharedRecord:
        """Also what another server has staged: the name's record says the same, whoever writes it. Raises
        SoftPromptError for what that one has registered, and somebody has deleted since."""
        if not self._lease.is_safe:
            self._lease.write()
        if not self._store.is_whole(staged):
            raise SoftPromptError(
                "its file is gone from the bucket: it was registered, and deleted since",
                param="file",
                code="invalid_file",
            )
        try:
            self._store.publish(StagedPrompt(self._store.describe(staged), staged))
        except (NameTaken, NameChanged):
            self._keep(self._store.local_file(self._store.describe(staged)))
            raise
        record = self._lease.shared.record
        return self.end(
            msgspec.structs.replace(
                record, status="succeeded", finished_at=int(time.time()), soft_prompt=record.name, preview=None
            )
        )

    def _keep(self, result: Path) -> None:
        """What does not get its name, for whoever waited for it. It goes when the job's record goes."""
        self._store.bucket.upload(result, result_key(self._id))
        self._is_kept = True

    def fail(self, code: str, message: str, param: str | None = None) -> SharedRecord:
        record, staged = self._lease.shared.record, self._lease.shared.staged
        if self._is_kept:
            message += (
                f"; the trained one is {self._store.bucket.url}/{result_key(self._id)}: download it, and "
                "`softbatch prompts import` registers it"
            )
        if code == NameChanged.CODE:
            record = msgspec.structs.replace(record, preview=None)
        elif record.preview is not None:
            message += f"; its preview stays registered as {record.name}, delete it before you try again"
        error = JobError(code, message, param)
        ended = self.end(msgspec.structs.replace(record, status="failed", finished_at=int(time.time()), error=error))
        if self._is_kept and staged is not None:  # not before: another server would find that it is gone
            self._store.discard(staged)
        return ended

    def cancel(self) -> SharedRecord:
        withdraw_preview(self._store, self._lease.shared)
        record = self._lease.shared.record
        return self.end(msgspec.structs.replace(record, status="cancelled", finished_at=int(time.time()), preview=None))

    def put_back(self) -> SharedRecord:
        return self._lease.give_back(self._files)

    def end(self, record: JobRecord) -> SharedRecord:
        return self._lease.write(record=record, files={}, progress=self._progress)


def withdraw_preview(store: ObjectStore, shared: SharedRecord) -> None:
    """Of a job that is to be cancelled, as its record says already: whoever comes next does it again."""
    if shared.preview is not None:
        withdraw(store, shared.preview.name, shared.preview.sha256)
        store.discard(shared.preview)


def _renewed(progress: ProgressMessage | None, files: dict[str, SavedFile], shared: SharedRecord) -> SharedRecord:
    """What a record that has come to its end says stays as it is."""
    if shared.record.status != "running":
        return shared
    return msgspec.structs.replace(shared, progress=progress, files=files)
