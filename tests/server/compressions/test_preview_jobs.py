"""A job's preview: whenever its server is killed, its name leads to the preview or to the trained one."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from prometheus_client import CollectorRegistry

from softbatch.prompt_store.manifest import PREVIEW_OF
from softbatch.prompt_store.stores.bucket import Bucket, BucketError
from softbatch.prompt_store.stores.directory import PromptStore
from softbatch.prompt_store.stores.object_store import ObjectStore
from softbatch.prompt_store.stores.store import NameTaken, SoftPromptStore
from softbatch.server.compressions import job_queue
from softbatch.server.compressions.job_lease import JobLease, LeaseLost
from softbatch.server.compressions.job_queue import CompressionJobs
from softbatch.server.compressions.leased_run import LeasedRun
from softbatch.server.compressions.record import Job, JobRecord, new_id, save
from softbatch.server.compressions.request import DIRECTORY, ModelChoice
from softbatch.server.compressions.run_directory import PREVIEW, RESULT
from softbatch.server.compressions.shared_queue import SharedCompressions
from softbatch.server.compressions.shared_record import SharedRecord, SharedRecords, result_key
from softbatch.server.compressions.worker_messages import DoneMessage, FailedMessage
from softbatch.server.compressions.worker_process import WorkerProcess
from tests.support.bucket_server import QUICK, BucketServer, object_store
from tests.support.killed_calls import Killed, killed_before_call
from tests.support.models import make_soft_prompt, save_prompt
from tests.support.soft_prompt_samples import MAX_BYTES, SPEC, write

NAME = "manual"


def make_files(directory: Path, job_id: str) -> tuple[str, str]:
    """What a worker leaves, and the hashes of preview and trained one."""
    (directory / "report").mkdir(parents=True)
    preview = make_soft_prompt("kv", 4, SPEC, seed=1, training={PREVIEW_OF: job_id})
    save_prompt(preview, directory, PREVIEW.removesuffix(".safetensors"))
    save_prompt(make_soft_prompt("kv", 4, SPEC, seed=2), directory, RESULT.removesuffix(".safetensors"))
    (directory / "report" / "report.json").write_text("{}")
    preview_hash, trained = (hashlib.sha256((directory / name).read_bytes()).hexdigest() for name in (PREVIEW, RESULT))
    return preview_hash, trained


def hashes(store: SoftPromptStore) -> list[str]:
    assert store.broken() == []
    return [stored.sha256 for stored in store.list()]


# --- a directory --------------------------------------------------------------------------------------------


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


def new_job(root: Path) -> tuple[str, str, str]:
    record = JobRecord(id=new_id(), name=NAME, status="running", created_at=1, fingerprint=SPEC.fingerprint)
    directory = root / DIRECTORY / record.id
    directory.mkdir(parents=True)
    (directory / "request.json").write_text("{}")
    save(directory, record)
    return record.id, *make_files(directory, record.id)


def server_on(root: Path) -> CompressionJobs:
    """One that has just begun, and starts no worker."""
    jobs = CompressionJobs(PromptStore(root, MAX_BYTES), SPEC, CollectorRegistry(), lambda: False)
    jobs._try_lock()
    return jobs


def killed(jobs: CompressionJobs) -> None:
    assert jobs._lock is not None
    jobs._lock.close()


async def register_preview(jobs: CompressionJobs, job: Job) -> FailedMessage | None:
    return await jobs._register_preview(job, WorkerProcess(job.directory, job.tell, lambda: None))


async def succeed(jobs: CompressionJobs, job: Job) -> None:
    """As if a worker had told of its preview, and of its end."""
    await register_preview(jobs, job)
    await jobs._register(job, DoneMessage({}))


async def cancel(jobs: CompressionJobs, job: Job) -> None:
    await register_preview(jobs, job)
    await jobs._finish(job, "cancelled")


def dying_at(moment: int, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Before or after any write, which are counted from here."""
    counted = iter(range(moment))

    def mortal(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            if next(counted, None) is None:
                raise Killed
            found = function(*arguments, **named)
            if next(counted, None) is None:
                raise Killed
            return found

        return call

    for name in ("save", "discard"):
        monkeypatch.setattr(job_queue, name, mortal(getattr(job_queue, name)))
    for name in ("add", "swap", "remove"):
        monkeypatch.setattr(PromptStore, name, mortal(getattr(PromptStore, name)))
    return monkeypatch


@pytest.mark.parametrize("end", [succeed, cancel])
def test_a_server_killed_at_any_write_leaves_one_of_the_two(
    tmp_path: Path, end: Callable[[CompressionJobs, Job], Any]
) -> None:
    seen = set[tuple[str, ...]]()
    for moment in range(24):
        root = tmp_path / str(moment)
        job_id, preview, trained = new_job(root)
        jobs = server_on(root)
        with contextlib.suppress(Killed), pytest.MonkeyPatch.context() as patch:
            dying_at(moment, patch)
            asyncio.run(end(jobs, jobs.get(job_id)))
        killed(jobs)
        found = hashes(PromptStore(root, MAX_BYTES))
        seen.add(tuple({preview: "preview", trained: "trained"}[sha256] for sha256 in found))

        jobs = server_on(root)
        job = jobs.get(job_id)
        if found == [trained]:
            assert end is succeed
        if job.is_final:
            asyncio.run(jobs._take_up(job))
        else:
            assert moment < 2 or found, "a registered name is never none while its job goes on"
            # Who wants it cancelled does not wait for its worker to begin again.
            asyncio.run(succeed(jobs, job) if end is succeed else jobs._finish(job, "cancelled"))
        killed(jobs)
        assert hashes(PromptStore(root, MAX_BYTES)) == ([trained] if end is succeed else [])
        record = jobs.get(job_id).record
        assert (record.status, record.preview) == ("succeeded" if end is succeed else "cancelled", None)
        assert {path.name for path in job.directory.iterdir()} <= {"job.json", "report"}
    assert seen == {(), ("preview",), ("trained",)} if end is succeed else {(), ("preview",)}


@pytest.mark.parametrize("how", ["deleted", "replaced", "deleted while its server was away"])
def test_a_name_that_a_user_has_changed_is_left_to_him(root: Path, tmp_path: Path, how: str) -> None:
    job_id, _, trained = new_job(root)
    jobs, store = server_on(root), PromptStore(root, MAX_BYTES)
    job = jobs.get(job_id)
    assert asyncio.run(register_preview(jobs, job)) is None
    store.remove(NAME)
    by_hand = [] if how.startswith("deleted") else [store.add(NAME, write(tmp_path / "upload", seed=7)).sha256]
    if how.endswith("away"):
        killed(jobs)
        jobs = server_on(root)
        job = jobs.get(job_id)
    asyncio.run(succeed(jobs, job))
    assert hashes(store) == by_hand
    assert (job.record.status, job.record.preview) == ("failed", None)
    assert job.record.error is not None
    assert (job.record.error.code, job.record.error.param) == ("name_changed", "name")
    result = job.directory / RESULT
    assert str(result) in job.record.error.message
    killed(jobs)
    jobs = server_on(root)
    asyncio.run(jobs._take_up(jobs.get(job_id)))
    assert store.add("another", result).sha256 == trained, "as the error says"


def test_a_preview_that_was_not_written_down_is_its_jobs_own(root: Path) -> None:
    """Its server was killed right after registering it; the worker had come to its end, and says so at once."""
    job_id, preview, trained = new_job(root)
    jobs, store = server_on(root), PromptStore(root, MAX_BYTES)
    job = jobs.get(job_id)
    assert store.add(NAME, job.directory / PREVIEW).sha256 == preview
    asyncio.run(jobs._register(job, DoneMessage({})))
    assert job.record.status == "succeeded"
    assert hashes(store) == [trained]


def test_a_name_that_is_taken_ends_the_run_early(root: Path, tmp_path: Path) -> None:
    job_id, *_ = new_job(root)
    taken = PromptStore(root, MAX_BYTES).add(NAME, write(tmp_path / "upload", seed=7))
    jobs = server_on(root)
    refusal = asyncio.run(register_preview(jobs, jobs.get(job_id)))
    assert refusal is not None
    assert (refusal.code, refusal.param) == ("name_taken", "name")
    assert hashes(PromptStore(root, MAX_BYTES)) == [taken.sha256]


def test_a_name_taken_meanwhile_costs_no_result(root: Path, tmp_path: Path) -> None:
    job_id, *_ = new_job(root)
    jobs, store = server_on(root), PromptStore(root, MAX_BYTES)
    job = jobs.get(job_id)
    (job.directory / PREVIEW).unlink()
    taken = store.add(NAME, write(tmp_path / "upload", seed=7))
    asyncio.run(jobs._register(job, DoneMessage({})))
    assert hashes(store) == [taken.sha256]
    assert job.record.error is not None
    assert job.record.error.code == "name_taken"
    assert str(job.directory / RESULT) in job.record.error.message
    assert (job.directory / RESULT).exists()


def test_a_failure_leaves_the_preview_and_says_so(root: Path) -> None:
    job_id, preview, _ = new_job(root)
    jobs = server_on(root)
    job = jobs.get(job_id)
    asyncio.run(register_preview(jobs, job))
    asyncio.run(jobs._fail(job, "worker_died", "it was killed"))
    assert hashes(PromptStore(root, MAX_BYTES)) == [preview]
    assert job.record.error is not None
    assert "stays registered as manual" in job.record.error.message


# --- a bucket -----------------------------------------------------------------------------------------------


@pytest.fixture
def url(locking_server: BucketServer) -> str:
    return locking_server.new_url()


def shared_job(url: str) -> tuple[SharedRecords, str]:
    records = SharedRecords(Bucket(url, QUICK))
    record = JobRecord(id=new_id(), name=NAME, status="queued", created_at=1, fingerprint=SPEC.fingerprint)
    assert records.create(SharedRecord(record=record, request_sha256="")) is not None
    return records, record.id


def taken(records: SharedRecords, job_id: str, holder: str) -> JobLease:
    seen = records.read(job_id)
    assert seen is not None
    record = msgspec.structs.replace(seen.shared.record, status="running")
    lease = JobLease.take(records, seen, holder, record)
    assert lease is not None
    return lease


def end_shared(run: LeasedRun, lease: JobLease) -> SharedRecord:
    """As a server that has taken it goes on."""
    if lease.shared.staged is not None:
        return run.publish_staged(lease.shared.staged)
    run.publish_preview()
    return run.publish(DoneMessage({}))


def test_a_job_of_all_servers_killed_at_any_call_goes_on_elsewhere(
    locking_server: BucketServer, tmp_path: Path
) -> None:
    """Before each call that changes something: between two of them the bucket stays the same."""
    base, seen = locking_server.new_url(), set[tuple[str, ...]]()
    preview, trained = make_files(tmp_path / "run", "cmpr-1")
    offers, is_killed, last = Bucket(base, QUICK).probe(), True, 0
    while is_killed:
        url = f"{base}/{last}"
        records, job_id = shared_job(url)
        store, other = (object_store(url, tmp_path / f"{name}{last}", MAX_BYTES) for name in ("one", "two"))
        store.offers = other.offers = offers
        lease = taken(records, job_id, "one")
        with killed_before_call(last, writes_only=True) as fate:
            end_shared(LeasedRun(store, lease, tmp_path / "run"), lease)
        is_killed, last = fate.is_killed, last + 1
        found = hashes(other)
        seen.add(tuple({preview: "preview", trained: "trained"}[sha256] for sha256 in found))
        shared = records.read(job_id)
        assert shared is not None
        assert found or shared.shared.record.preview is None
        if shared.shared.record.status == "running":
            lease = taken(records, job_id, "two")
            end_shared(LeasedRun(other, lease, tmp_path / "run"), lease)
        assert hashes(other) == [trained]
        assert other.local_file(other.get(NAME)).read_bytes() == (tmp_path / "run" / RESULT).read_bytes()
        shared = records.read(job_id)
        assert shared is not None
        assert (shared.shared.record.status, shared.shared.record.preview) == ("succeeded", None)
    assert seen == {(), ("preview",), ("trained",)}


def test_a_preview_of_whoever_was_overtaken_gets_no_name(url: str, tmp_path: Path) -> None:
    records, job_id = shared_job(url)
    store = object_store(url, tmp_path / "copies", MAX_BYTES)
    make_files(tmp_path / "run", job_id)
    first = LeasedRun(store, taken(records, job_id, "one"), tmp_path / "run")
    second = taken(records, job_id, "two")
    with pytest.raises(LeaseLost):
        first.publish_preview()
    assert store.list() == []
    assert store.bucket.list("objects/") == []
    end_shared(LeasedRun(store, second, tmp_path / "run"), second)
    assert len(store.bucket.list("objects/")) == 1


@pytest.mark.parametrize("how", ["deleted", "replaced"])
def test_a_name_that_a_user_has_changed_is_left_to_him_in_a_bucket(url: str, tmp_path: Path, how: str) -> None:
    records, job_id = shared_job(url)
    store = object_store(url, tmp_path / "copies", MAX_BYTES)
    make_files(tmp_path / "run", job_id)
    queue = queue_of(url, tmp_path / "server")
    lease = taken(records, job_id, "one")
    run = LeasedRun(store, lease, tmp_path / "run")
    run.publish_preview()
    assert lease.shared.record.preview is not None
    store.remove(NAME)
    by_hand = [] if how == "deleted" else [store.add(NAME, write(tmp_path / "upload", seed=7)).sha256]
    run.publish_preview()
    assert hashes(store) == by_hand, "a run that goes on says again that it has a preview"
    asyncio.run(queue._publish(run, lambda: run.publish(DoneMessage({}))))
    assert hashes(store) == by_hand
    record = lease.shared.record
    assert (record.status, record.preview) == ("failed", None)
    assert record.error is not None
    assert record.error.code == "name_changed"
    assert_kept(store, lease, by_hand, tmp_path)


def assert_kept(store: ObjectStore, lease: JobLease, by_hand: list[str], tmp_path: Path) -> None:
    """The trained one can be downloaded, as the error says, and nothing else is left of it."""
    record = lease.shared.record
    key = result_key(record.id)
    assert record.error is not None
    assert f"{store.bucket.url}/{key}" in record.error.message
    store.bucket.download(key, tmp_path / "downloaded")
    assert (tmp_path / "downloaded").read_bytes() == (tmp_path / "run" / RESULT).read_bytes()
    assert len(store.bucket.list("objects/")) == len(by_hand)
    SharedRecords(store.bucket).delete(record.id)
    assert store.bucket.list(f"compressions/{record.id}") == []


@pytest.mark.parametrize("when", ["nothing is staged", "its preview is staged", "it is staged"])
def test_a_name_taken_meanwhile_costs_no_result_in_a_bucket(url: str, tmp_path: Path, when: str) -> None:
    records, job_id = shared_job(url)
    store = object_store(url, tmp_path / "copies", MAX_BYTES)
    make_files(tmp_path / "run", job_id)
    lease = taken(records, job_id, "one")
    queue, run = queue_of(url, tmp_path / "server"), LeasedRun(store, lease, tmp_path / "run")
    if when == "its preview is staged":
        lease.write(preview=store.stage(NAME, tmp_path / "run" / PREVIEW).record)
    if when == "it is staged":
        lease.write(staged=store.stage(NAME, tmp_path / "run" / RESULT).record)
    by_hand = store.add(NAME, write(tmp_path / "upload", seed=7)).sha256
    (tmp_path / "run" / PREVIEW).unlink()
    if when == "its preview is staged":
        with pytest.raises(NameTaken):
            run.publish_preview()
        assert lease.shared.preview is None, "before its objects go: whoever comes must not take that for a deletion"
    asyncio.run(queue._publish(run, lambda: end_shared(run, lease)))
    assert hashes(store) == [by_hand]
    assert lease.shared.record.error is not None
    assert lease.shared.record.error.code == "name_taken"
    assert_kept(store, lease, [by_hand], tmp_path)


@pytest.mark.parametrize("what", ["preview", "staged"])
def test_what_was_written_without_an_answer_is_there_for_whoever_reads_it(url: str, tmp_path: Path, what: str) -> None:
    records, job_id = shared_job(url)
    store = object_store(url, tmp_path / "copies", MAX_BYTES)
    _, trained = make_files(tmp_path / "run", job_id)
    lease = taken(records, job_id, "one")
    run, write_record = LeasedRun(store, lease, tmp_path / "run"), JobLease.write

    def without_an_answer(self: JobLease, **changes: Any) -> SharedRecord:
        write_record(JobLease(records, self.seen), **changes)
        raise BucketError("no answer")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JobLease, "write", without_an_answer)
        with pytest.raises(BucketError):
            run.publish_preview() if what == "preview" else run.publish(DoneMessage({}))
    lease.write()  # the next beat
    promised = lease.shared.preview if what == "preview" else lease.shared.staged
    assert promised is not None
    assert store.is_whole(promised)
    end_shared(run, lease)
    assert hashes(store) == [trained]
    assert lease.shared.record.status == "succeeded"


def test_what_the_next_holder_reads_is_not_taken_from_it(url: str, tmp_path: Path) -> None:
    """The write was done, its answer lost, and the lease too before it was asked for again."""
    records, job_id = shared_job(url)
    store = object_store(url, tmp_path / "copies", MAX_BYTES)
    _, trained = make_files(tmp_path / "run", job_id)
    lease = taken(records, job_id, "one")
    write_record = JobLease.write

    def overtaken(self: JobLease, **changes: Any) -> SharedRecord:
        write_record(JobLease(records, self.seen), **changes)
        taken(records, job_id, "two")
        return write_record(self, **changes)

    run = LeasedRun(store, lease, tmp_path / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JobLease, "write", overtaken)
        with pytest.raises(LeaseLost):
            run.publish_preview()
    second = taken(records, job_id, "three")
    end_shared(LeasedRun(store, second, tmp_path / "run"), second)
    assert hashes(store) == [trained]


def test_a_preview_whose_objects_went_before_it_had_its_name_leaves_it_free(url: str, tmp_path: Path) -> None:
    """All servers were away for longer than what no name leads to is kept."""
    records, job_id = shared_job(url)
    store = object_store(url, tmp_path / "copies", MAX_BYTES)
    _, trained = make_files(tmp_path / "run", job_id)
    lease = taken(records, job_id, "one")
    staged = store.stage(NAME, tmp_path / "run" / PREVIEW).record
    lease.write(preview=staged)
    store.discard(staged)
    LeasedRun(store, lease, tmp_path / "run").publish(DoneMessage({}))
    assert hashes(store) == [trained]
    assert lease.shared.record.status == "succeeded"


def queue_of(url: str, root: Path) -> SharedCompressions:
    store = object_store(url, root, MAX_BYTES)
    assert store.offers.replace
    choice = ModelChoice("model", "model", "float32", "cpu")
    return SharedCompressions(store, SPEC, CollectorRegistry(), lambda: False, lambda: choice)


@pytest.mark.parametrize("when", ["it waits for a server", "a server is at work on it"])
def test_a_cancelled_job_takes_its_preview_along(url: str, tmp_path: Path, when: str) -> None:
    records, job_id = shared_job(url)
    store = object_store(url, tmp_path / "copies", MAX_BYTES)
    make_files(tmp_path / "run", job_id)
    lease = taken(records, job_id, "one")
    run = LeasedRun(store, lease, tmp_path / "run")
    run.publish_preview()
    assert len(hashes(store)) == 1
    queue = queue_of(url, tmp_path / "server")
    if when == "it waits for a server":
        run.put_back()
    seen = records.read(job_id)
    assert seen is not None
    queue._learn(seen)
    queue._wish_cancelled(job_id)
    if when != "it waits for a server":
        assert len(hashes(store)) == 1, "its server hears of it first"
        run.cancel()
    ended = records.read(job_id)
    assert ended is not None
    assert (ended.shared.record.status, ended.shared.record.preview) == ("cancelled", None)
    assert hashes(store) == []
    assert store.bucket.list("objects/") == []
