"""`/v1/files`."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

from softbatch.server.batches.batch_record import FilePurpose


class FileObject(BaseModel):
    """Times are Unix seconds; the file is deleted when `expires_at` has come."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int | None
    filename: str
    purpose: FilePurpose
    status: Literal["processed"] = "processed"
    status_details: None = None


class FileList(BaseModel):
    """`has_more`: go on with `after` the last id."""

    object: Literal["list"] = "list"
    data: list[FileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class FileDeleted(BaseModel):
    """The reply to a deletion."""

    id: str
    object: Literal["file"] = "file"
    deleted: bool = Field(default=True)
