"""Files and batches as they are kept: what OpenAI calls `file-…` and `batch_…`."""

from __future__ import annotations

import secrets
import time
from typing import Literal

import msgspec

BatchStatus = Literal[
    "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"
]
ENDED: frozenset[BatchStatus] = frozenset({"failed", "completed", "expired", "cancelled"})
FilePurpose = Literal["batch", "batch_output"]


class FileRecord(msgspec.Struct, frozen=True, kw_only=True):
    """Times are Unix seconds; a file is deleted when `expires_at` has come. `owner` as in a request's record."""

    id: str
    owner: str
    filename: str
    purpose: FilePurpose
    bytes: int
    created_at: int
    expires_at: int | None = None


class LineError(msgspec.Struct, frozen=True):
    """Why an input file cannot be run; `line` counts from 1."""

    code: str
    message: str
    param: str | None = None
    line: int | None = None


class BatchRecord(msgspec.Struct, kw_only=True):
    """`cause` is why a batch is ending without all its answers; `keep_output` is for how many seconds
    its files stay."""

    id: str
    owner: str
    endpoint: str
    input_file_id: str
    completion_window: str
    status: BatchStatus = "validating"
    metadata: dict[str, str] | None = None
    keep_output: int
    created_at: int
    expires_at: int
    in_progress_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    cause: Literal["cancelled", "expired"] | None = None
    total: int = 0
    completed: int = 0
    failed: int = 0
    output_file_id: str | None = None
    error_file_id: str | None = None
    errors: list[LineError] | None = None

    @property
    def has_ended(self) -> bool:
        return self.status in ENDED

    @property
    def left(self) -> int:
        return 0 if self.has_ended else self.total - self.completed - self.failed


class PendingLine(msgspec.Struct, frozen=True):
    """A line of a batch without an answer: its number, and where in the input file it stands."""

    batch_id: str
    number: int
    custom_id: str
    offset: int
    length: int


def new_id(prefix: str) -> str:
    """In the order of creation, which lists follow."""
    return f"{prefix}{time.time_ns():016x}{secrets.token_hex(8)}"


def first_id(prefix: str, since: float) -> str:
    """Before it in order are the ids of what was created before that time."""
    return f"{prefix}{int(since * 1e9):016x}"
