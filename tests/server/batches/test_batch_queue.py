"""Every line is answered exactly once, whatever ends the server, the batch or the line."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from softbatch.server.batches.batch_queue import BatchLimits, BatchQueue
from softbatch.server.batches.batch_record import BatchRecord, FileRecord, new_id
from softbatch.server.batches.line_answer import Ask, LineReply, LineRequest
from softbatch.server.observability.metrics import Metrics
from softbatch.server.request_failures import BatchesUnavailable, BatchNotRunning, TooManyBatches, UnknownBatch

URL = "/v1/completions"
LIMITS = BatchLimits(max_lines=1000, max_file_bytes=1 << 20, max_line_bytes=1 << 16, concurrency=4)
OK = LineReply(200, b'{"ok":true}')


def make_queue(root: Path, draining: bool = False) -> BatchQueue:
    return BatchQueue(root, LIMITS, Metrics(), lambda: draining)


async def add_batch(
    queue: BatchQueue, num_lines: int, seconds: int = 3600, text: str | None = None, owner: str = ""
) -> str:
    lines = (
        json.dumps({"custom_id": f"q{i}", "method": "POST", "url": URL, "body": {"prompt": f"p{i}"}})
        for i in range(num_lines)
    )
    file_id, now = new_id("file-"), int(time.time())
    with queue.files.upload() as file:
        file.write((text if text is not None else "\n".join(lines)).encode())
        size = queue.files.keep(file, file_id)
    queue.ledger.add_file(
        FileRecord(id=file_id, owner="", filename="in.jsonl", purpose="batch", bytes=size, created_at=now)
    )
    record = BatchRecord(
        id=new_id("batch_"),
        owner=owner,
        endpoint=URL,
        input_file_id=file_id,
        completion_window="24h",
        keep_output=3600,
        created_at=now,
        expires_at=now + seconds,
    )
    await queue.create(record)
    return record.id


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(20_000):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it does not come true")


async def ended(queue: BatchQueue, batch_id: str) -> BatchRecord:
    await until(lambda: record_of(queue, batch_id).has_ended)
    return record_of(queue, batch_id)


def record_of(queue: BatchQueue, batch_id: str) -> BatchRecord:
    record = queue.ledger.batch(batch_id, None)
    assert record is not None
    return record


def lines_of(queue: BatchQueue, file_id: str | None) -> list[dict[str, Any]]:
    if file_id is None:
        return []
    return [json.loads(line) for line in queue.files.path(file_id).read_text().splitlines()]


def run(root: Path, test: Callable[[BatchQueue], Awaitable[None]], ask: Ask | None) -> None:
    async def main() -> None:
        async with make_queue(root).running() as queue:
            if ask is not None:
                queue.begin(ask)
            await test(queue)

    asyncio.run(main())


def test_answers_stand_in_the_order_of_the_lines_and_errors_apart(tmp_path: Path) -> None:
    at_once = most_at_once = 0
    refused = {b'{"prompt": "p3"}', b'{"prompt": "p7"}'}
    busy = Counter[str]()

    async def ask(request: LineRequest) -> LineReply:
        nonlocal at_once, most_at_once
        at_once += 1
        most_at_once = max(most_at_once, at_once)
        await asyncio.sleep(random.random() / 100)
        at_once -= 1
        busy[request.id] += 1
        if request.body == b'{"prompt": "p5"}' and busy[request.id] < 3:
            return LineReply(503, b'{"error":{}}', 0.0)
        return LineReply(400, b'{"error":{"code":"x"}}') if request.body in refused else OK

    async def test(queue: BatchQueue) -> None:
        record = await ended(queue, await add_batch(queue, 30))
        assert (record.status, record.total, record.completed, record.failed) == ("completed", 30, 28, 2)
        output, errors = lines_of(queue, record.output_file_id), lines_of(queue, record.error_file_id)
        assert [line["custom_id"] for line in output] == [f"q{i}" for i in range(30) if i not in (3, 7)]
        assert {line["id"] for line in output + errors} == set(busy)
        assert output[0] == {
            "id": output[0]["id"],
            "custom_id": "q0",
            "response": {"status_code": 200, "request_id": output[0]["id"], "body": {"ok": True}},
            "error": None,
        }
        assert [(line["custom_id"], line["response"]["status_code"]) for line in errors] == [("q3", 400), ("q7", 400)]
        assert set(busy.values()) == {1, 3}
        assert most_at_once == LIMITS.concurrency

    run(tmp_path, test, ask)


def test_lines_that_have_to_wait_leave_their_places_to_others(tmp_path: Path) -> None:
    async def ask(request: LineRequest) -> LineReply:
        return LineReply(503, b'{"error":{}}', 60.0) if request.owner == "unlucky" else OK

    async def test(queue: BatchQueue) -> None:
        waiting = await add_batch(queue, 3 * LIMITS.concurrency, owner="unlucky")
        await asyncio.sleep(0.1)
        record = await ended(queue, await add_batch(queue, 3 * LIMITS.concurrency))
        assert (record.status, record.completed) == ("completed", 3 * LIMITS.concurrency)
        await queue.cancel(waiting, None)
        assert (await ended(queue, waiting)).failed == 3 * LIMITS.concurrency
        assert queue._places._value == LIMITS.concurrency

    run(tmp_path, test, ask)


def test_a_disk_that_fails_at_the_end_leaves_no_files_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("softbatch.server.batches.batch_run.SECONDS_BEFORE_ANOTHER_TRY", 0.01)
    failures = 3

    async def ask(_: LineRequest) -> LineReply:
        return OK

    async def test(queue: BatchQueue) -> None:
        save = queue.ledger.save

        def full(record: BatchRecord, *, files: Sequence[FileRecord] = ()) -> None:
            nonlocal failures
            if files and failures:
                failures -= 1
                raise BatchesUnavailable("the disk is full", code="disk_error")
            save(record, files=files)

        monkeypatch.setattr(queue.ledger, "save", full)
        record = await ended(queue, await add_batch(queue, 3))
        assert (record.status, failures) == ("completed", 0)
        assert {path.name for path in (tmp_path / "files").iterdir()} == queue.ledger.file_ids()

    run(tmp_path, test, ask)


def test_nobody_takes_the_room_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(queue: BatchQueue) -> None:
        monkeypatch.setattr("softbatch.server.batches.batch_queue.MAX_UNFINISHED", 1)
        await add_batch(queue, 1, owner="busy")
        with pytest.raises(TooManyBatches, match="unfinished"):
            await add_batch(queue, 1, owner="busy")
        await add_batch(queue, 1, owner="other")
        monkeypatch.setattr("softbatch.server.batches.batch_queue.MAX_BATCHES", 1)
        monkeypatch.setattr("softbatch.server.batches.batch_queue.MAX_UNFINISHED", 9)
        with pytest.raises(TooManyBatches, match="remembered"):
            await add_batch(queue, 1, owner="busy")

    run(tmp_path, test, None)


def test_old_batches_are_forgotten_once_they_have_ended(tmp_path: Path) -> None:
    async def ask(_: LineRequest) -> LineReply:
        return OK

    async def test(queue: BatchQueue) -> None:
        batch_id = await add_batch(queue, 1)
        queue.ledger.forget_old(int(time.time()) + 5)
        assert (await ended(queue, batch_id)).completed == 1
        queue.ledger.forget_old(int(time.time()) - 5)
        assert queue.ledger.batch(batch_id, None) is not None
        queue.ledger.forget_old(int(time.time()) + 5)
        assert queue.ledger.batch(batch_id, None) is None

    run(tmp_path, test, ask)


def test_a_wrong_file_fails_and_nothing_of_it_is_asked(tmp_path: Path) -> None:
    async def ask(request: LineRequest) -> LineReply:
        raise AssertionError(request)

    async def test(queue: BatchQueue) -> None:
        record = await ended(queue, await add_batch(queue, 0, text="{\n"))
        assert (record.status, record.total, record.output_file_id) == ("failed", 0, None)
        assert [error.code for error in record.errors or []] == ["invalid_json_line"]

    run(tmp_path, test, ask)


@pytest.mark.parametrize("cause", ["cancelled", "expired"])
def test_what_is_given_up_is_told_and_what_was_answered_stays(tmp_path: Path, cause: str) -> None:
    answered = asyncio.Event()

    async def ask(request: LineRequest) -> LineReply:
        if json.loads(request.body)["prompt"] in ("p0", "p2"):
            return OK
        answered.set()
        await asyncio.Event().wait()
        raise AssertionError

    async def test(queue: BatchQueue) -> None:
        batch_id = await add_batch(queue, 9, seconds=2 if cause == "expired" else 3600)
        await answered.wait()
        if cause == "cancelled":
            await until(lambda: record_of(queue, batch_id).completed == 2)
            assert (await queue.cancel(batch_id, None)).status == "cancelling"
        record = await ended(queue, batch_id)
        assert (record.status, record.completed, record.failed) == (cause, 2, 7)
        assert [line["custom_id"] for line in lines_of(queue, record.output_file_id)] == ["q0", "q2"]
        errors = lines_of(queue, record.error_file_id)
        assert [line["custom_id"] for line in errors] == [f"q{i}" for i in (1, 3, 4, 5, 6, 7, 8)]
        assert {(line["response"], line["error"]["code"]) for line in errors} == {(None, f"batch_{cause}")}
        await until(lambda: not queue._runs)
        with pytest.raises(BatchNotRunning, match=cause):
            await queue.cancel(batch_id, None)
        with pytest.raises(UnknownBatch):
            await queue.cancel(batch_id, "somebody else")

    run(tmp_path, test, ask)


def _serve_and_die(root: Path, seed: int) -> None:
    """A server that is gone at a moment nobody chose; what it asked is told on disk, before the answer."""
    rng = random.Random(seed)

    async def ask(request: LineRequest) -> LineReply:
        await asyncio.sleep(rng.random() / 200)
        return LineReply(200, request.body)

    async def main() -> None:
        asyncio.get_running_loop().call_later(0.02 + rng.random() / 10, os._exit, 9)
        async with make_queue(root).running() as queue:
            queue.begin(ask)
            await asyncio.sleep(60)

    asyncio.run(main())


def test_servers_that_are_killed_one_after_another_answer_each_line_once(tmp_path: Path) -> None:
    ids: list[str] = []

    async def create(queue: BatchQueue) -> None:
        ids.extend([await add_batch(queue, 150) for _ in range(2)])

    run(tmp_path, create, None)
    context = multiprocessing.get_context("fork")
    for seed in range(12):
        process = context.Process(target=_serve_and_die, args=(tmp_path, seed))
        process.start()
        process.join(30)
        assert process.exitcode == 9

    async def finish(queue: BatchQueue) -> None:
        for batch_id in ids:
            record = await ended(queue, batch_id)
            assert (record.status, record.completed, record.failed) == ("completed", 150, 0)
            output = lines_of(queue, record.output_file_id)
            assert [line["custom_id"] for line in output] == [f"q{i}" for i in range(150)]
            assert [line["response"]["body"] for line in output] == [{"prompt": f"p{i}"} for i in range(150)]
        known = queue.ledger.file_ids()
        assert {path.name for path in (tmp_path / "files").iterdir()} == known
        assert len(known) == 4

    async def ask(request: LineRequest) -> LineReply:
        return LineReply(200, request.body)

    run(tmp_path, finish, ask)


def test_one_server_at_a_time_and_another_takes_over(tmp_path: Path) -> None:
    async def main() -> None:
        second = make_queue(tmp_path)
        async with make_queue(tmp_path).running() as first:
            batch_id = await add_batch(first, 3)
            async with second.running():
                with pytest.raises(BatchesUnavailable) as refused:
                    _ = second.ledger
                assert refused.value.code == "batches_elsewhere"
        async with second.running() as queue:
            await until(lambda: queue._ledger is not None)

            async def ask(_: LineRequest) -> LineReply:
                return OK

            queue.begin(ask)
            assert (await ended(queue, batch_id)).status == "completed"

    asyncio.run(main())


def test_a_directory_that_cannot_be_used_is_told(tmp_path: Path) -> None:
    for text, code in ((b"no database at all" * 100, "disk_error"), (None, "store_read_only")):
        root = tmp_path / code
        if text is None:
            root.write_text("a file")
        else:
            root.mkdir()
            (root / "batches.sqlite3").write_bytes(text)

        async def test(queue: BatchQueue, code: str = code) -> None:
            with pytest.raises(BatchesUnavailable) as refused:
                queue.check_open()
            assert refused.value.code == code

        run(root, test, None)


def test_a_file_is_deleted_when_its_time_is_over(tmp_path: Path) -> None:
    from softbatch.server.batches.batch_queue import _sweep

    async def test(queue: BatchQueue) -> None:
        now = int(time.time())
        for name, expires_at in (("file-old", now - 1), ("file-new", now + 60)):
            queue.files.write(name, [b"{}"])
            queue.ledger.add_file(
                FileRecord(
                    id=name, owner="", filename="x", purpose="batch", bytes=3, created_at=now, expires_at=expires_at
                )
            )
        _sweep(queue.ledger, queue.files)
        assert queue.ledger.file_ids() == {"file-new"}
        assert [path.name for path in (tmp_path / "files").iterdir()] == ["file-new"]

    run(tmp_path, test, None)
