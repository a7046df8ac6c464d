"""`/v1/batches`: the requests of a file, answered behind all others."""

from __future__ import annotations

import asyncio
import time
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from softbatch.server.batches.batch_queue import KEPT_SECONDS
from softbatch.server.batches.batch_record import BatchRecord, new_id
from softbatch.server.http.errors import invalid
from softbatch.server.observability.request_record import current
from softbatch.server.request_failures import UnknownBatch, UnknownBatchFile
from softbatch.server.routes.common import json_reply, services_of, visible_owner
from softbatch.server.schemas.base import ERROR_REPLIES, MAX_NAME_CHARS
from softbatch.server.schemas.batches import (
    BatchErrors,
    BatchLineError,
    BatchList,
    BatchObject,
    BatchRequest,
    RequestCounts,
)

router = APIRouter(prefix="/v1/batches", tags=["batches"], responses=ERROR_REPLIES)


@router.post("", response_model=BatchObject, summary="Run a file of requests (OpenAI)")
async def create_batch(request: Request, body: BatchRequest) -> Response:
    """The file is checked first: with anything wrong in it the batch becomes `failed`, and `errors` says in which
    lines. Its requests are answered behind all others, and each of them once, whatever happens to the server."""
    services = services_of(request)
    services.batches.check_open()
    file = await asyncio.to_thread(services.batches.ledger.file, body.input_file_id, visible_owner(services))
    if file is None:
        raise UnknownBatchFile(body.input_file_id, param="input_file_id")
    if file.purpose != "batch":
        raise invalid("input_file_id", f"the file's purpose is {file.purpose}; upload one with the purpose batch")
    now = int(time.time())
    record = BatchRecord(
        id=new_id("batch_"),
        owner=current().owner,
        endpoint=body.endpoint,
        input_file_id=file.id,
        completion_window=body.completion_window,
        metadata=body.metadata,
        keep_output=body.output_expires_after.seconds if body.output_expires_after else KEPT_SECONDS,
        created_at=now,
        expires_at=now + body.window_seconds,
    )
    reply = _object(record)  # as it is before it begins
    await services.batches.create(record)
    return json_reply(reply)


@router.get("", response_model=BatchList, summary="All batches, newest first")
async def list_batches(
    request: Request,
    after: Annotated[str | None, Query(max_length=MAX_NAME_CHARS)] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> Response:
    """Where there are several API keys, a key's own; an admin key sees all."""
    services = services_of(request)
    found = await asyncio.to_thread(services.batches.ledger.batches, visible_owner(services), after, limit + 1)
    page = [_object(record) for record in found[:limit]]
    first, last = (page[0].id, page[-1].id) if page else (None, None)
    return json_reply(BatchList(data=page, first_id=first, last_id=last, has_more=len(found) > limit))


@router.get("/{id}", response_model=BatchObject, summary="One batch, with its progress")
async def get_batch(request: Request, id: str) -> Response:
    services = services_of(request)
    record = await asyncio.to_thread(services.batches.ledger.batch, id, visible_owner(services))
    if record is None:
        raise UnknownBatch(id)
    return json_reply(_object(record))


@router.post("/{id}/cancel", response_model=BatchObject, summary="Stop a batch")
async def cancel_batch(request: Request, id: str) -> Response:
    """What is answered stays, in its output file; the other lines stand in the error file with `batch_cancelled`."""
    services = services_of(request)
    return json_reply(_object(await services.batches.cancel(id, visible_owner(services))))


def _object(record: BatchRecord) -> BatchObject:
    errors = None
    if record.errors is not None:
        data = [
            BatchLineError(code=error.code, message=error.message, param=error.param, line=error.line)
            for error in record.errors
        ]
        errors = BatchErrors(data=data)
    return BatchObject(
        id=record.id,
        endpoint=record.endpoint,
        errors=errors,
        input_file_id=record.input_file_id,
        completion_window=record.completion_window,
        status=record.status,
        output_file_id=record.output_file_id,
        error_file_id=record.error_file_id,
        created_at=record.created_at,
        in_progress_at=record.in_progress_at,
        expires_at=record.expires_at,
        finalizing_at=record.finalizing_at,
        completed_at=record.completed_at,
        failed_at=record.failed_at,
        expired_at=record.expired_at,
        cancelling_at=record.cancelling_at,
        cancelled_at=record.cancelled_at,
        request_counts=RequestCounts(total=record.total, completed=record.completed, failed=record.failed),
        metadata=record.metadata,
    )
