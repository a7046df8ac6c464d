"""Of all servers on a bucket one has a job: whoever was overtaken writes nothing, and takes nothing away."""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
import time
from collections import Counter
from pathlib import Path

import msgspec
import pytest

from softbatch.prompt_store.manifest import SoftPromptError
from softbatch.prompt_store.stores.bucket import Bucket, BucketError
from softbatch.server.compressions import job_lease, leased_run
from softbatch.server.compressions.job_lease import JobLease, LeaseLost
from softbatch.server.compressions.leased_run import LeasedRun
from softbatch.server.compressions.record import JobRecord, new_id
from softbatch.server.compressions.shared_record import SavedFile, Seen, SharedRecord, SharedRecords, record_key
from softbatch.server.compressions.work_snapshot import WorkSnapshots, restore
from softbatch.server.compressions.worker_messages import DoneMessage, ProgressMessage
from tests.support.bucket_server import QUICK, BucketServer, object_store
from tests.support.faulty_proxy import Fault, FaultyProxy
from tests.support.models import make_soft_prompt, save_prompt
from tests.support.servers import wait_for
from tests.support.soft_prompt_samples import MAX_BYTES, SPEC, write


@pytest.fixture
def url(locking_server: BucketServer) -> str:
    return locking_server.new_url()


@pytest.fixture
def records(url: str) -> SharedRecords:
    return SharedRecords(Bucket(url, QUICK))


def queued(records: SharedRecords) -> Seen:
    record = JobRecord(id=new_id(), name="manual", status="queued", created_at=1, fingerprint="0" * 64)
    seen = records.create(SharedRecord(record=record, request_sha256=""))
    assert seen is not None
    return seen


def take(records: SharedRecords, seen: Seen, holder: str) -> JobLease | None:
    record = msgspec.structs.replace(seen.shared.record, status="running")
    return JobLease.take(records, seen, holder, record)


def taken(records: SharedRecords, seen: Seen, holder: str) -> JobLease:
    lease = take(records, seen, holder)
    assert lease is not None
    return lease


def test_of_many_that_take_a_job_at_once_one_has_it(records: SharedRecords) -> None:
    seen, start = queued(records), threading.Barrier(6)
    outcomes: Counter[bool] = Counter()

    def run(holder: str) -> None:
        start.wait()
        outcomes[take(records, seen, holder) is not None] += 1

    threads = [threading.Thread(target=run, args=(str(number),)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes == {True: 1, False: 5}


def test_whoever_was_overtaken_writes_nothing_more(records: SharedRecords) -> None:
    first = taken(records, queued(records), "one")
    first.write()
    second = taken(records, first.seen, "two")
    assert second.token == first.token + 1
    for _ in range(2):
        with pytest.raises(LeaseLost):
            first.write(cancelled=True)
    found = records.read(second.shared.record.id)
    assert found is not None
    assert (found.shared.holder, found.shared.cancelled) == ("two", False)
    second.write()


def test_a_wish_to_cancel_does_not_cost_the_lease(records: SharedRecords) -> None:
    lease = taken(records, queued(records), "one")
    assert records.replace(lease.seen, msgspec.structs.replace(lease.shared, cancelled=True)) is not None
    assert lease.write(progress=None).cancelled


def test_a_damaged_record_is_no_job(records: SharedRecords) -> None:
    job_id = queued(records).shared.record.id
    found = records.bucket.read(record_key(job_id))
    assert found is not None
    records.bucket.write(record_key(job_id), found[0].replace(b"manual", b"menual"))
    assert records.read(job_id) is None


def test_a_result_of_whoever_was_overtaken_gets_no_name(url: str, records: SharedRecords, tmp_path: Path) -> None:
    store = object_store(url, tmp_path / "copies", MAX_BYTES)
    first = taken(records, queued(records), "one")
    directory = tmp_path / "run"
    (directory / "report").mkdir(parents=True)
    save_prompt(make_soft_prompt("kv", 4, SPEC), directory, "soft_prompt")
    (directory / "report" / "report.json").write_text("{}")
    run = LeasedRun(store, first, directory)
    second = taken(records, first.seen, "two")
    with pytest.raises(LeaseLost):
        run.publish(DoneMessage({}))
    assert store.list() == []
    assert store.bucket.list("objects/") == []
    ended = LeasedRun(store, second, directory).publish(DoneMessage({"kl_closed": 0.5}))
    assert (ended.record.status, ended.record.soft_prompt) == ("succeeded", "manual")
    assert [stored.name for stored in store.list()] == ["manual"]


def test_a_staged_result_is_named_once_by_whoever_comes(url: str, records: SharedRecords, tmp_path: Path) -> None:
    """Its first server was killed between writing that it will have the name, and giving it."""
    store = object_store(url, tmp_path / "copies", MAX_BYTES)
    file = save_prompt(make_soft_prompt("kv", 4, SPEC), tmp_path, "result")
    first = taken(records, queued(records), "one")
    staged = store.stage("manual", file)
    first.write(staged=staged.record)
    second = taken(records, first.seen, "two")
    assert second.shared.staged is not None
    assert LeasedRun(store, second, tmp_path).publish_staged(second.shared.staged).record.status == "succeeded"
    assert store.publish(staged).version == store.get("manual").version, "the first one was only slow"
    assert len(store.bucket.list("objects/")) == 1


def test_a_run_goes_on_from_the_files_of_one_moment(records: SharedRecords, tmp_path: Path) -> None:
    bucket = records.bucket
    work = tmp_path / "one" / "work"
    (work / "checkpoint").mkdir(parents=True)
    (work / "checkpoint" / "state.json").write_text("1")
    (work / "train.jsonl").write_text("a")
    (tmp_path / "one" / "model").write_text("0" * 64)
    snapshots = WorkSnapshots(bucket, "cmpr-1", 1, tmp_path / "one")
    files = snapshots.save()
    assert files is not None
    assert snapshots.save() is None, "nothing has changed"
    (work / "new").write_text("2")
    (work / "new").replace(work / "checkpoint" / "state.json")
    newer = snapshots.save()
    assert newer is not None
    assert newer["work/train.jsonl"] == files["work/train.jsonl"], "only what has changed is sent"
    other = WorkSnapshots(bucket, "cmpr-1", 2, tmp_path / "one")
    others = other.save()
    assert others is not None
    snapshots.discard([*newer.values(), *others.values()])
    assert restore(bucket, others, tmp_path / "two")
    assert (tmp_path / "two" / "work" / "checkpoint" / "state.json").read_text() == "2"
    assert (tmp_path / "two" / "model").read_text() == "0" * 64
    assert not restore(bucket, newer, tmp_path / "three"), "they are gone"
    assert not (tmp_path / "three" / "work").exists()


@pytest.mark.parametrize("fault", ["lost", "flip", "garble", "reset"])
def test_a_lease_outlasts_a_bad_line(url: str, proxy: FaultyProxy, fault: Fault) -> None:
    """Its holder is not taken for another whose write came between, and what is read is what was written."""
    draw = random.Random(fault)
    records = SharedRecords(Bucket(url, QUICK))
    lease = taken(records, queued(records), "one")
    proxy.choose = lambda method, path: fault if draw.random() < 0.3 else None
    for number in range(8):
        with contextlib.suppress(BucketError):
            lease.write(progress=ProgressMessage("training", number, 8))
    assert proxy.done[fault]
    proxy.choose = lambda method, path: None
    shared = lease.write()
    found = records.read(shared.record.id)
    assert found is not None
    assert (found.shared, found.shared.holder, found.shared.token) == (shared, "one", 1)


@pytest.mark.parametrize("method", ["PUT", "DELETE"])
def test_one_call_that_hangs_does_not_cost_the_lease(
    url: str, proxy: FaultyProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Neither a renewal, nor the deletion of what is not needed any more. At a third of the real times."""
    for module, name in ((job_lease, "LEASE"), (job_lease, "RENEW"), (leased_run, "BEAT")):
        monkeypatch.setattr(module, f"{name}_SECONDS", getattr(module, f"{name}_SECONDS") / 3)
    store = object_store(url, tmp_path / "copies", MAX_BYTES)
    lease = taken(SharedRecords(store.bucket), queued(SharedRecords(store.bucket)), "one")
    run = LeasedRun(store, lease, tmp_path / "run")
    (tmp_path / "run").mkdir()
    folder = f"compressions/{lease.shared.record.id}/files/{lease.token:06d}-"
    run._files = {"work/state": SavedFile(f"{folder}old", "0" * 64, 1)}
    proxy.choose = lambda asked, path: "hang" if asked == method and not proxy.done["hang"] else None

    async def scenario() -> None:
        async with run.renewing():
            await asyncio.sleep(0.1)  # the files are known to the renewing
            run._files = {}
            await asyncio.to_thread(wait_for, lambda: proxy.done["hang"], "nothing hangs")
            lost = time.monotonic() + job_lease.LEASE_SECONDS * 2 / 3  # by whoever waited for the call
            await asyncio.to_thread(wait_for, lambda: lease._renewed > lost or run._lost, "it is not renewed")
            assert not run._lost
            assert proxy.done["hang"] == 1
            proxy.release.set()

    asyncio.run(scenario())


def test_a_staged_result_that_was_deleted_is_not_registered_again(
    url: str, records: SharedRecords, tmp_path: Path
) -> None:
    """Its first server had given it the name, and was killed before it wrote that down."""
    store = object_store(url, tmp_path / "copies", MAX_BYTES)
    staged = store.stage("manual", write(tmp_path / "result", seed=0))
    lease = taken(records, queued(records), "two")
    lease.write(staged=staged.record)
    store.publish(staged)
    store.remove("manual")
    with pytest.raises(SoftPromptError, match="deleted since"):
        LeasedRun(store, lease, tmp_path).publish_staged(staged.record)
    assert store.list() == []
    assert store.broken() == []


def test_what_is_put_back_has_not_ended_and_does_not_end_later(records: SharedRecords, tmp_path: Path) -> None:
    store = object_store(records.bucket.url, tmp_path / "copies", MAX_BYTES)
    ended = taken(records, queued(records), "one")
    run = LeasedRun(store, ended, tmp_path)
    run.fail("unreadable", "its end is written while the server is told to go")
    assert run.put_back().record.status == "failed"
    lease = taken(records, queued(records), "one")
    run = LeasedRun(store, lease, tmp_path)
    assert (run.put_back().record.status, lease.shared.holder, lease.is_safe) == ("queued", "", False)
    with pytest.raises(LeaseLost):
        run.fail("late", "a thread that nobody could stop")
    found = records.read(lease.shared.record.id)
    assert found is not None
    assert found.shared.record.status == "queued"
