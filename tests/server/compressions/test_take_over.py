"""What a server finds in the queue of one that is gone, before it takes it up."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from softbatch.prompt_store.manifest import ModelSpec
from softbatch.prompt_store.stores.directory import PromptStore
from softbatch.server.compressions.job_queue import CompressionJobs
from softbatch.server.compressions.record import Job, JobRecord, load_jobs, new_id, save
from softbatch.server.compressions.request import DIRECTORY
from softbatch.server.request_failures import CompressionEnded

SPEC = ModelSpec("tiny", "0" * 64, 64, 3, 2, 8)


def left_behind(root: Path, status: str, **fields: int) -> Path:
    record = JobRecord(id=new_id(), name="x", status=status, created_at=1, fingerprint=SPEC.fingerprint, **fields)  # type: ignore[arg-type]
    directory = root / DIRECTORY / record.id
    directory.mkdir(parents=True)
    save(directory, record)
    return directory


async def cancel(root: Path, job_id: str, meanwhile: int) -> Job:
    """While the queue's own task has had `meanwhile` turns."""
    jobs = CompressionJobs(PromptStore(root, 1 << 20), SPEC, CollectorRegistry(), lambda: False)
    async with asyncio.timeout(20), jobs.running():
        for _ in range(meanwhile):
            await asyncio.sleep(0)
        job = jobs.get(job_id)
        await jobs.cancel(job)
        return job


def test_a_job_that_was_running_can_be_cancelled_at_once(tmp_path: Path) -> None:
    directory = left_behind(tmp_path, "running")
    (directory / "request.json").write_text("{}")
    assert asyncio.run(cancel(tmp_path, directory.name, 0)).record.status == "cancelled"
    (found,) = load_jobs(tmp_path / DIRECTORY, SPEC.fingerprint)
    assert found.record.status == "cancelled"


def test_a_job_that_fails_meanwhile_has_one_end(tmp_path: Path) -> None:
    directory = left_behind(tmp_path, "running")  # without its request
    with pytest.raises(CompressionEnded, match="has failed already"):
        asyncio.run(cancel(tmp_path, directory.name, 1))
    (found,) = load_jobs(tmp_path / DIRECTORY, SPEC.fingerprint)
    assert found.record.status == "failed"


def test_jobs_of_one_second_keep_their_order(tmp_path: Path) -> None:
    made = [left_behind(tmp_path, "queued").name for _ in range(20)]
    assert [job.record.id for job in load_jobs(tmp_path / DIRECTORY, SPEC.fingerprint)] == made
