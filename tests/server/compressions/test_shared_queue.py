"""What a server does with a job of all servers, and what it leaves to the others."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from prometheus_client import CollectorRegistry

from softbatch.prompt_store.stores.bucket import Bucket, Offers
from softbatch.server.compressions.job_lease import JobLease
from softbatch.server.compressions.record import JobRecord, new_id
from softbatch.server.compressions.request import ModelChoice
from softbatch.server.compressions.shared_queue import SharedCompressions
from softbatch.server.compressions.shared_record import Seen, SharedRecord, SharedRecords, record_key, request_key
from softbatch.server.request_failures import CompressionEnded, CompressionsUnavailable
from tests.support.bucket_server import QUICK, BucketServer, object_store
from tests.support.soft_prompt_samples import MAX_BYTES, SPEC, write

CHOICE = ModelChoice("model", "model", "float32", "cpu")


@pytest.fixture
def url(locking_server: BucketServer) -> str:
    return locking_server.new_url()


@pytest.fixture
def records(url: str) -> SharedRecords:
    return SharedRecords(Bucket(url, QUICK))


def queued(records: SharedRecords) -> Seen:
    """A job whose request is refused before a worker starts."""
    record = JobRecord(id=new_id(), name="manual", status="queued", created_at=1, fingerprint=SPEC.fingerprint)
    records.bucket.write(request_key(record.id), b"not what the record says")
    seen = records.create(SharedRecord(record=record, request_sha256=""))
    assert seen is not None
    return seen


def queue_of(url: str, root: Path, choice: Callable[[], ModelChoice] = lambda: CHOICE) -> SharedCompressions:
    store = object_store(url, root, MAX_BYTES)
    assert store.offers.replace
    return SharedCompressions(store, SPEC, CollectorRegistry(), lambda: False, choice)


@pytest.mark.parametrize(
    ("create", "replace", "missing"), [(False, True, "(If-None-Match)"), (True, False, "(If-Match)")]
)
def test_a_store_with_half_of_the_conditions_keeps_no_jobs(
    tmp_path: Path, create: bool, replace: bool, missing: str
) -> None:
    store = object_store(f"memory://{tmp_path.name}/p", tmp_path / "one", MAX_BYTES)
    store.offers = Offers(create, replace)
    queue = SharedCompressions(store, SPEC, CollectorRegistry(), lambda: False, lambda: CHOICE)
    with pytest.raises(CompressionsUnavailable) as refused:
        queue.check_place("manual")
    assert refused.value.code == "compressions_unavailable"
    assert missing in refused.value.message


def take(queue: SharedCompressions, seen: Seen) -> None:
    queue._learn(seen)
    asyncio.run(queue._take(queue._known[seen.shared.record.id]))


def overtaken(records: SharedRecords, job_id: str) -> JobLease:
    """By a server that takes the holder for dead."""
    seen = records.read(job_id)
    assert seen is not None
    lease = JobLease.take(records, seen, "another", seen.shared.record)
    assert lease is not None
    return lease


def test_whoever_has_lost_a_job_leaves_all_of_it_to_the_next(url: str, records: SharedRecords, tmp_path: Path) -> None:
    seen = queued(records)
    job_id = seen.shared.record.id
    checkpoint = f"compressions/{job_id}/files/000002-{'0' * 64}"

    def lose() -> ModelChoice:
        overtaken(records, job_id)
        records.bucket.write(checkpoint, b"of the next holder")
        return CHOICE

    take(queue_of(url, tmp_path / "one", lose), seen)
    left = {found.key for found in records.bucket.list("compressions/")}
    assert left == {record_key(job_id), request_key(job_id), checkpoint}
    found = records.read(job_id)
    assert found is not None
    assert (found.shared.record.status, found.shared.holder) == ("running", "another")


def test_whoever_has_ended_a_job_clears_it_away(url: str, records: SharedRecords, tmp_path: Path) -> None:
    seen = queued(records)
    take(queue_of(url, tmp_path / "one"), seen)
    (left,) = records.bucket.list("compressions/")
    assert left.key == record_key(seen.shared.record.id)
    found = records.read(seen.shared.record.id)
    assert found is not None
    assert found.shared.record.error is not None
    assert found.shared.record.error.code == "unreadable"


def test_servers_of_one_machine_do_not_work_in_one_directory(url: str, records: SharedRecords, tmp_path: Path) -> None:
    """What a killed one has left goes at the next start."""
    seen = queued(records)
    job_id = seen.shared.record.id
    left = tmp_path / "copies" / ".compressions" / "server-killed" / job_id
    left.mkdir(parents=True)

    async def scenario() -> None:
        one, other = (queue_of(url, tmp_path / "copies") for _ in range(2))
        one._is_draining = other._is_draining = lambda: True
        async with one.running(), other.running():
            one._learn(seen)
            other._learn(seen)
            of_other = other.get(job_id).directory
            of_other.mkdir()
            (of_other / "request.json").write_text("{}")
            assert not left.exists()
            await one._take(one._known[job_id])
            assert one.get(job_id).record.status == "failed"
            assert (of_other / "request.json").exists()

    asyncio.run(scenario())
    assert list((tmp_path / "copies" / ".compressions").iterdir()) == []


@pytest.mark.parametrize("cancelled", ["before its server was gone", "after"])
def test_what_has_its_name_is_not_called_cancelled(
    url: str, records: SharedRecords, tmp_path: Path, cancelled: str
) -> None:
    """Its server is gone since it wrote that the soft prompt will have the name."""
    queue, store = queue_of(url, tmp_path / "one"), object_store(url, tmp_path / "gone", MAX_BYTES)
    lease = overtaken(records, queued(records).shared.record.id)
    staged = store.stage("manual", write(tmp_path / "upload", seed=0))
    store.publish(staged)
    record = msgspec.structs.replace(lease.shared.record, status="running")
    lease.write(record=record, staged=staged.record, cancelled=cancelled.startswith("before"))
    queue._learn(lease.seen)
    known = queue._known[lease.shared.record.id]
    known.since -= 60

    async def scenario() -> None:
        cancelling = asyncio.create_task(queue.cancel(known.job))
        await asyncio.sleep(0.2)
        assert not known.job.is_final
        await queue._take(known)
        with pytest.raises(CompressionEnded, match="succeeded"):
            await cancelling

    asyncio.run(scenario())
    assert (known.job.record.status, known.job.record.soft_prompt) == ("succeeded", "manual")
    assert [stored.name for stored in store.list()] == ["manual"]
