"""A compression job's record, job.json: what a restarted server knows of it."""

from __future__ import annotations

import asyncio
import re
import secrets
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import msgspec

from softbatch.prompt_store.atomic_files import replace_file, sync
from softbatch.server.compressions.worker_messages import ProgressMessage

Status = Literal["queued", "running", "succeeded", "failed", "cancelled"]
FINAL: frozenset[Status] = frozenset({"succeeded", "failed", "cancelled"})
ID = re.compile(r"cmpr-[0-9a-f]{24}")


class JobError(msgspec.Struct, frozen=True):
    code: str
    message: str
    param: str | None = None


class JobRecord(msgspec.Struct, kw_only=True):
    """Times are Unix seconds. `attempts` counts the workers that were started for it. `preview` is the SHA-256 of its
    preview, from when that is registered until it is swapped or withdrawn."""

    id: str
    name: str
    status: Status
    created_at: int
    fingerprint: str
    started_at: int | None = None
    finished_at: int | None = None
    attempts: int = 0
    soft_prompt: str | None = None
    fidelity: dict[str, Any] | None = None
    error: JobError | None = None
    preview: str | None = None


@dataclass
class Job:
    """A record, the directory it lives in, and what only the running server knows: progress and who watches."""

    record: JobRecord
    directory: Path
    progress: ProgressMessage | None = None
    cancelled: bool = False
    is_ending: bool = False
    version: int = 0
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def is_final(self) -> bool:
        return self.record.status in FINAL

    @property
    def report(self) -> Path:
        return self.directory / "report" / "report.html"

    def tell(self, progress: ProgressMessage) -> None:
        self.progress = progress
        self.notify()

    def notify(self) -> None:
        """Wake everybody who watches."""
        self.version += 1
        event, self.changed = self.changed, asyncio.Event()
        event.set()


def save(directory: Path, record: JobRecord) -> None:
    """Blocks until the record is on disk; a reader or a crash sees the old one or the new one, whole."""
    content = msgspec.json.encode(record)
    replace_file(directory / "job.json", lambda path: path.write_bytes(content))
    sync(directory)


def new_id() -> str:
    """In the order of creation, so that a restarted server keeps it."""
    return f"cmpr-{time.time_ns():016x}{secrets.token_hex(4)}"


def load_jobs(root: Path, fingerprint: str) -> list[Job]:
    """All jobs below `root`, oldest first; one whose record cannot be read is a failed one. A directory without a
    record was never acknowledged and is deleted."""
    found = []
    for directory in root.iterdir():
        path = directory / "job.json"
        if not ID.fullmatch(directory.name):
            continue
        if not path.exists():
            shutil.rmtree(directory, ignore_errors=True)
            continue
        try:
            record = msgspec.json.decode(path.read_bytes(), type=JobRecord)
        except (OSError, msgspec.MsgspecError):
            created = int(directory.stat().st_mtime)
            record = JobRecord(
                id=directory.name,
                name="unknown",
                status="failed",
                created_at=created,
                finished_at=int(time.time()),
                fingerprint=fingerprint,
                error=JobError("unreadable", "the job's record on disk cannot be read; send the job again"),
            )
        found.append(Job(record, directory))
    return sorted(found, key=lambda job: (job.record.created_at, job.record.id))
