"""One batch from its check to its files, whatever breaks off in between."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from softbatch.server.batches.batch_files import BatchFiles
from softbatch.server.batches.batch_input import CheckedInput, body_of
from softbatch.server.batches.batch_record import BatchRecord, FileRecord, PendingLine, new_id
from softbatch.server.batches.ledger import Ledger
from softbatch.server.batches.line_answer import CAUSES, Ask, LineRequest, answered, new_request_id, unanswered
from softbatch.server.request_failures import BatchesUnavailable, BatchNotRunning

logger = logging.getLogger(__name__)
LINES_AT_A_TIME = 64
# After the disk has failed a batch.
SECONDS_BEFORE_ANOTHER_TRY = 10.0
LEAST_SECONDS_BETWEEN_ASKS = 0.5


class BatchRun:
    """Owns an unfinished batch; its record is on disk whenever anything has changed that others are told of."""

    def __init__(
        self, record: BatchRecord, ledger: Ledger, files: BatchFiles, max_lines: int, max_line_bytes: int
    ) -> None:
        self.record = record
        self._ledger = ledger
        self._files = files
        self._max_lines = max_lines
        self._max_line_bytes = max_line_bytes
        self._answering: asyncio.Task[None] | None = None
        self._changing = asyncio.Lock()

    async def to_its_end(self, ask: Ask, places: asyncio.Semaphore, count: Callable[[bool], None]) -> None:
        """`places` bounds how many lines of all batches are asked at once; `count` hears of every answer."""
        while not self.record.has_ended:
            try:
                if self.record.status == "validating":
                    await self._check()
                if self.record.status == "in_progress":
                    await self._answer_until_expiry(ask, places, count)
                if not self.record.has_ended:
                    await self._end()
            except (BatchesUnavailable, OSError) as error:
                logger.error("batch %s: %s; tried again in a moment", self.record.id, error)
                await asyncio.sleep(SECONDS_BEFORE_ANOTHER_TRY)
        logger.info("batch %s: %s", self.record.id, self.record.status)

    async def cancel(self) -> None:
        """Raises BatchNotRunning when it is ending already; being cancelled once more changes nothing."""
        async with self._changing:
            if self.record.status == "cancelling":
                return
            if self.record.status not in ("validating", "in_progress") or self.record.cause is not None:
                raise BatchNotRunning(self.record.status)
            await self._change(status="cancelling", cause="cancelled", cancelling_at=int(time.time()))
        if self._answering is not None:
            self._answering.cancel()

    async def _change(
        self, *, lines: Sequence[PendingLine] | None = None, files: Sequence[FileRecord] = (), **fields: Any
    ) -> None:
        """What memory says is on disk before."""
        changed = msgspec.structs.replace(self.record, **fields)
        if lines is not None:
            await asyncio.to_thread(self._ledger.begin, changed, lines)
        else:
            await asyncio.to_thread(self._ledger.save, changed, files=files)
        self.record = changed

    async def _check(self) -> None:
        record = self.record
        checked = CheckedInput(record.id, record.endpoint, self._max_lines, self._max_line_bytes)
        await asyncio.to_thread(checked.read, self._files.path(record.input_file_id))
        async with self._changing:
            if self.record.status != "validating":  # cancelled meanwhile
                return
            now = int(time.time())
            if checked.errors:
                await self._change(status="failed", failed_at=now, errors=checked.errors)
            else:
                total = len(checked.lines)
                await self._change(lines=checked.lines, status="in_progress", in_progress_at=now, total=total)

    async def _answer_until_expiry(self, ask: Ask, places: asyncio.Semaphore, count: Callable[[bool], None]) -> None:
        self._answering = asyncio.create_task(self._answer_all(ask, places, count))
        left = max(0.0, self.record.expires_at - time.time())
        try:
            done, _ = await asyncio.wait({self._answering}, timeout=left)
            if not done and self.record.cause is None:
                self.record.cause = "expired"
        finally:
            self._answering.cancel()
            await asyncio.gather(self._answering, return_exceptions=True)
        if not self._answering.cancelled():
            error = self._answering.exception()
            if isinstance(error, ExceptionGroup):
                raise error.exceptions[0]
            if error is not None:
                raise error

    async def _answer_all(self, ask: Ask, places: asyncio.Semaphore, count: Callable[[bool], None]) -> None:
        after = 0
        begun = asyncio.Semaphore(LINES_AT_A_TIME)
        async with asyncio.TaskGroup() as group:
            while lines := await asyncio.to_thread(self._ledger.pending, self.record.id, after, LINES_AT_A_TIME):
                for line in lines:
                    await begun.acquire()
                    place = _Place(places)
                    await place.take()
                    task = group.create_task(self._answer(line, ask, place, count))
                    task.add_done_callback(place.leave)
                    task.add_done_callback(lambda _: begun.release())
                after = lines[-1].number

    async def _answer(self, line: PendingLine, ask: Ask, place: _Place, count: Callable[[bool], None]) -> None:
        record = self.record
        has_succeeded = False
        try:
            body = await asyncio.to_thread(body_of, self._files.path(record.input_file_id), line)
        except ValueError as error:
            answer = unanswered(line.custom_id, "input_changed", str(error))
        else:
            request = LineRequest(new_request_id(), record.endpoint, record.owner, body)
            reply = await ask(request)
            while (seconds := reply.retry_after) is not None:
                place.leave()  # to lines of other batches, which may be luckier
                await asyncio.sleep(max(LEAST_SECONDS_BETWEEN_ASKS, seconds))
                await place.take()
                reply = await ask(request)
            answer, has_succeeded = answered(line.custom_id, request, reply), reply.has_succeeded
        if await asyncio.to_thread(self._ledger.answer, line, answer, has_succeeded=has_succeeded):
            count(has_succeeded)
            self.record.completed += has_succeeded
            self.record.failed += not has_succeeded

    async def _end(self) -> None:
        """Lines without an answer get the reason why; once they have it, none that comes late counts."""
        async with self._changing:
            status = self.record.status if self.record.cause == "cancelled" else "finalizing"
            await self._change(status=status, finalizing_at=self.record.finalizing_at or int(time.time()))
        files, counts = await asyncio.to_thread(self._write_files)
        try:
            await self._list(files, counts)
        except BatchesUnavailable:
            for file in files.values():
                await asyncio.to_thread(self._files.remove, file.id)
            raise

    async def _list(self, files: Mapping[str, FileRecord], counts: Mapping[str, int]) -> None:
        ids = {f"{kind}_file_id": file.id for kind, file in files.items()}
        status = self.record.cause or "completed"
        fields: dict[str, Any] = {"status": status, f"{status}_at": int(time.time()), **ids, **counts}
        await self._change(files=list(files.values()), **fields)

    def _write_files(self) -> tuple[dict[str, FileRecord], dict[str, int]]:
        """Both files or neither, and how many lines have succeeded, and how many have not."""
        record = self.record
        cause = record.cause
        if cause is not None:
            code, message = f"batch_{cause}", CAUSES[cause]
            self._ledger.answer_rest(record.id, lambda custom_id: unanswered(custom_id, code, message))
        written = self._ledger.batch(record.id, None)
        assert written is not None
        files: dict[str, FileRecord] = {}
        try:
            for kind, count in (("output", written.completed), ("error", written.failed)):
                if count:
                    files[kind] = self._write_file(kind)
        except (BatchesUnavailable, OSError):
            for file in files.values():
                self._files.remove(file.id)
            raise
        return files, {"completed": written.completed, "failed": written.failed}

    def _write_file(self, kind: str) -> FileRecord:
        record, file_id = self.record, new_id("file-")
        lines = self._ledger.answers(record.id, has_succeeded=kind == "output")
        num_bytes = self._files.write(file_id, lines)
        now = int(time.time())
        return FileRecord(
            id=file_id,
            owner=record.owner,
            filename=f"{record.id}_{kind}.jsonl",
            purpose="batch_output",
            bytes=num_bytes,
            created_at=now,
            expires_at=now + record.keep_output,
        )


class _Place:
    """One of the places, as long as its line is asked; may be left more than once."""

    def __init__(self, places: asyncio.Semaphore) -> None:
        self._places = places
        self._is_taken = False

    async def take(self) -> None:
        await self._places.acquire()
        self._is_taken = True

    def leave(self, _: object = None) -> None:
        if self._is_taken:
            self._is_taken = False
            self._places.release()
