"""`/v1/files`: what batches read, and what they have written."""

from __future__ import annotations

import asyncio
import time
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import FileResponse

from softbatch.server.batches.batch_queue import KEPT_SECONDS, MAX_FILES
from softbatch.server.batches.batch_record import FilePurpose, FileRecord, new_id
from softbatch.server.http.batch_upload import FILE_BODY, read_batch_file
from softbatch.server.http.errors import ApiError
from softbatch.server.http.open_file import OpenFile
from softbatch.server.observability.request_record import current
from softbatch.server.request_failures import (
    BatchesUnavailable,
    BatchFileInUse,
    TooManyBatches,
    UnknownBatchFile,
    storage_failure,
)
from softbatch.server.routes.common import json_reply, services_of, visible_owner
from softbatch.server.schemas.base import ERROR_REPLIES, MAX_NAME_CHARS
from softbatch.server.schemas.files import FileDeleted, FileList, FileObject
from softbatch.server.services import Services

router = APIRouter(prefix="/v1/files", tags=["batches"], responses=ERROR_REPLIES)


@router.post("", response_model=FileObject, summary="Upload a file of requests (OpenAI)", openapi_extra=FILE_BODY)
async def create_file(request: Request) -> Response:
    """`curl -F purpose=batch -F file=@requests.jsonl http://127.0.0.1:8000/v1/files`"""
    batches = services_of(request).batches
    batches.check_open()
    if await asyncio.to_thread(batches.ledger.num_files, current().owner) >= MAX_FILES:
        raise TooManyBatches(f"{MAX_FILES} files are kept; delete some of them")
    limit = batches.limits.max_file_bytes
    async with read_batch_file(request, batches.files) as upload:
        if upload.num_bytes > limit:
            raise ApiError(413, f"file: it is larger than the {limit} bytes that a file may have", param="file")
        file_id = new_id("file-")
        try:
            num_bytes = await asyncio.to_thread(batches.files.keep, upload.file, file_id)
        except OSError as error:
            raise storage_failure(error) from error
    now = int(time.time())
    record = FileRecord(
        id=file_id,
        owner=current().owner,
        filename=upload.filename,
        purpose="batch",
        bytes=num_bytes,
        created_at=now,
        expires_at=now + (upload.keep_seconds or KEPT_SECONDS),
    )
    try:
        await asyncio.to_thread(batches.ledger.add_file, record)
    except BatchesUnavailable:
        await asyncio.to_thread(batches.files.remove, file_id)
        raise
    return json_reply(_object(record))


@router.get("", response_model=FileList, summary="All files")
async def list_files(
    request: Request,
    purpose: FilePurpose | None = None,
    after: Annotated[str | None, Query(max_length=MAX_NAME_CHARS)] = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Literal["asc", "desc"] = "desc",
) -> Response:
    """Where there are several API keys, a key's own; an admin key sees all."""
    services = services_of(request)
    owner = visible_owner(services)
    found = await asyncio.to_thread(services.batches.ledger.files, owner, purpose, order, after, limit + 1)
    page = [_object(record) for record in found[:limit]]
    first, last = (page[0].id, page[-1].id) if page else (None, None)
    return json_reply(FileList(data=page, first_id=first, last_id=last, has_more=len(found) > limit))


@router.get("/{id}", response_model=FileObject, summary="One file")
async def get_file(request: Request, id: str) -> Response:
    return json_reply(_object(await _find(services_of(request), id)))


@router.get("/{id}/content", response_class=FileResponse, summary="Download a file")
async def get_file_content(request: Request, id: str) -> Response:
    services = services_of(request)
    record = await _find(services, id)
    try:
        file = await asyncio.to_thread(services.batches.files.path(record.id).open, "rb")
    except FileNotFoundError as error:  # deleted meanwhile
        raise UnknownBatchFile(id) from error
    return OpenFile(file, record.filename, "application/jsonl")


@router.delete("/{id}", response_model=FileDeleted, summary="Delete a file")
async def delete_file(request: Request, id: str) -> Response:
    """Not while an unfinished batch reads it (409)."""
    services = services_of(request)
    record = await _find(services, id)
    batch_id = await asyncio.to_thread(services.batches.ledger.remove_file, record.id)
    if batch_id is not None:
        raise BatchFileInUse(id, batch_id)
    await asyncio.to_thread(services.batches.files.remove, record.id)
    return json_reply(FileDeleted(id=record.id))


async def _find(services: Services, file_id: str) -> FileRecord:
    """Raises UnknownBatchFile, also for another key's."""
    record = await asyncio.to_thread(services.batches.ledger.file, file_id, visible_owner(services))
    if record is None:
        raise UnknownBatchFile(file_id)
    return record


def _object(record: FileRecord) -> FileObject:
    return FileObject(
        id=record.id,
        bytes=record.bytes,
        created_at=record.created_at,
        expires_at=record.expires_at,
        filename=record.filename,
        purpose=record.purpose,
    )
