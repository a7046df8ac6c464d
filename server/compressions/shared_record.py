"""A compression job as a bucket keeps it: its record, and the lease on it, changed by conditional writes alone.

compressions/<id>/job.json      the record below, with its own hash in front
compressions/<id>/request.json  what is to be compressed; goes with the end of the job
compressions/<id>/files/…       what a run goes on from, named by the record; goes with the end of the job
compressions/<id>/report        the page, with its own hash in front
compressions/<id>/soft_prompt.safetensors  a result that did not get its name
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import msgspec

from softbatch.prompt_store.stores.bucket import Bucket
from softbatch.prompt_store.stores.bucket_files import Etag
from softbatch.prompt_store.stores.prompt_record import PromptRecord, seal, unseal
from softbatch.server.compressions.record import ID, JobRecord
from softbatch.server.compressions.worker_messages import ProgressMessage

logger = logging.getLogger(__name__)
FOLDER = "compressions/"
_RECORD = "/job.json"


class SavedFile(msgspec.Struct, frozen=True):
    """Of a run's directory."""

    key: str
    sha256: str
    num_bytes: int


class SharedRecord(msgspec.Struct, frozen=True, kw_only=True):
    """`token` grows whenever a server takes the job, `changes` with every write. `staged` is the result, which
    waits for its name alone; `preview` will have the name until then, and has it once the job's record says so."""

    record: JobRecord
    request_sha256: str
    token: int = 0
    holder: str = ""
    changes: int = 0
    cancelled: bool = False
    progress: ProgressMessage | None = None
    files: dict[str, SavedFile] = {}
    staged: PromptRecord | None = None
    preview: PromptRecord | None = None


@dataclass(frozen=True)
class Seen:
    """A record as it was at one moment."""

    shared: SharedRecord
    etag: Etag


class SharedRecords:
    """Raises BucketError."""

    def __init__(self, bucket: Bucket) -> None:
        self.bucket = bucket

    def etags(self) -> dict[str, Etag]:
        """Of all jobs, by one listing."""
        found = {}
        for info in self.bucket.list(FOLDER):
            job_id = info.key.removeprefix(FOLDER).removesuffix(_RECORD)
            if info.key.endswith(_RECORD) and ID.fullmatch(job_id):
                found[job_id] = info.etag
        return found

    def read(self, job_id: str) -> Seen | None:
        """None too for one that stays damaged, however often it is read."""
        reason: Exception | None = None
        for _ in range(3):
            found = self.bucket.read(record_key(job_id))
            if found is None:
                return None
            try:
                return Seen(msgspec.json.decode(unseal(found[0]), type=SharedRecord), found[1])
            except (ValueError, msgspec.MsgspecError) as error:
                reason = error
        logger.error("the record of compression %s is damaged: %s", job_id, reason)
        return None

    def create(self, shared: SharedRecord) -> Seen | None:
        content = seal(msgspec.json.encode(shared))
        if not self.bucket.create(record_key(shared.record.id), content):
            return None
        return self.read(shared.record.id)

    def replace(self, seen: Seen, shared: SharedRecord) -> Seen | None:
        """None, and nothing is written, where the record is another by now."""
        shared = msgspec.structs.replace(shared, changes=seen.shared.changes + 1)
        etag = self.bucket.replace(record_key(shared.record.id), seal(msgspec.json.encode(shared)), seen.etag)
        return None if etag is None else Seen(shared, etag)

    def delete(self, job_id: str) -> None:
        """The record first: without it there is no job."""
        self.bucket.delete(record_key(job_id))
        self.clean(job_id)
        self.bucket.delete(report_key(job_id))
        self.bucket.delete(result_key(job_id))

    def clean(self, job_id: str) -> None:
        """Delete what only a run needs."""
        self.bucket.delete(request_key(job_id))
        for info in self.bucket.list(f"{FOLDER}{job_id}/files/"):
            self.bucket.delete(info.key)


def record_key(job_id: str) -> str:
    return f"{FOLDER}{job_id}{_RECORD}"


def request_key(job_id: str) -> str:
    return f"{FOLDER}{job_id}/request.json"


def result_key(job_id: str) -> str:
    return f"{FOLDER}{job_id}/soft_prompt.safetensors"


def report_key(job_id: str) -> str:
    return f"{FOLDER}{job_id}/report"
