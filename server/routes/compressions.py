"""`/v1/compressions`: compress a context on the server, in the background."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from fastapi import APIRouter, Request, Response
from fastapi.responses import FileResponse

from softbatch.prompt_store.compression.data.examples import Example
from softbatch.prompt_store.manifest import SoftPromptError
from softbatch.prompt_store.template import TemplateError
from softbatch.server.compressions.prepare import ModelFiles, PreparedRun
from softbatch.server.compressions.queues import served_choice
from softbatch.server.compressions.record import Job
from softbatch.server.compressions.request import (
    CompressionRequest,
    InputError,
    ModelChoice,
    make_request,
    make_settings,
)
from softbatch.server.http.errors import ApiError
from softbatch.server.http.sse import EventStream
from softbatch.server.request_failures import shown, storage_failure
from softbatch.server.routes.common import engine_info, is_base_model, json_reply, services_of
from softbatch.server.schemas.base import ERROR_REPLIES, ERRORS_OF_STREAMS
from softbatch.server.schemas.compressions import (
    CompressionJob,
    CompressionJobList,
    CompressionRequestBody,
    JobErrorBody,
    JobProgress,
)
from softbatch.server.services import Services

router = APIRouter(prefix="/v1/compressions", tags=["compressions"], responses=ERROR_REPLIES)
# A report quotes texts of the context and of the model: nothing in it may run or be fetched.
_REPORT_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; img-src data:",
    "X-Content-Type-Options": "nosniff",
}


@router.post("", status_code=202, response_model=CompressionJob, summary="Compress a context")
async def create_compression(request: Request, body: CompressionRequestBody) -> Response:
    """Queue a job. One runs at a time, at low priority beside serving, and survives a restart of the server; the
    soft prompt can be used as soon as the job has succeeded, with `preview` before it is trained."""
    services = services_of(request)
    services.compressions.check_place(body.name)
    try:
        checked = await asyncio.to_thread(_checked, services, body)
    except InputError as error:
        status = 409 if error.code == "name_taken" else 413 if error.code == "too_large" else 400
        status = 507 if error.code == "disk_full" else status
        raise ApiError(status, str(error), param=error.param, code=error.code) from error
    except TemplateError as error:
        raise ApiError(400, str(error), param=error.param, code=error.code) from error
    job = await services.compressions.create(checked)
    return Response(
        _object(job).model_dump_json(),
        202,
        {"Location": f"{router.prefix}/{job.record.id}"},
        media_type="application/json",
    )


@router.get("", response_model=CompressionJobList, summary="All compressions, newest first")
async def list_compressions(request: Request) -> Response:
    jobs = services_of(request).compressions.list()
    return json_reply(CompressionJobList(data=[_object(job) for job in jobs]))


@router.get("/{id}", response_model=CompressionJob, summary="One compression")
async def get_compression(request: Request, id: str) -> Response:
    return json_reply(_object(services_of(request).compressions.get(id)))


@router.get(
    "/{id}/events",
    status_code=200,
    response_class=EventStream,
    responses={200: {"model": CompressionJob}, **ERRORS_OF_STREAMS},
    summary="Its progress, as server-sent events",
)
async def get_compression_events(request: Request, id: str) -> Response:
    """The job as it is now, then whenever it has changed; the last event is its final state."""
    compressions = services_of(request).compressions
    job = compressions.get(id)

    async def events() -> AsyncGenerator[str | bytes, None]:
        async for changed in compressions.watch(job):
            yield _object(changed).model_dump_json()

    return EventStream(events(), (), f"{router.prefix}/{{id}}/events")


@router.post("/{id}/cancel", response_model=CompressionJob, summary="Stop it")
async def cancel_compression(request: Request, id: str) -> Response:
    """The job is over when the reply comes. A finished one cannot be cancelled (409)."""
    compressions = services_of(request).compressions
    job = compressions.get(id)
    await compressions.cancel(job)
    return json_reply(_object(job))


@router.get("/{id}/report", response_class=FileResponse, summary="Its fidelity report, as a page")
async def get_compression_report(request: Request, id: str) -> Response:
    compressions = services_of(request).compressions
    job = compressions.get(id)
    try:
        report = await compressions.report(job)
    except OSError as error:
        raise storage_failure(error) from error
    if report is None:
        message = f"the compression {shown(id)} has no report: it is {job.record.status}"
        raise ApiError(404, message, param="id", code="no_report")
    return FileResponse(report, media_type="text/html; charset=utf-8", headers=_REPORT_HEADERS)


def _checked(services: Services, body: CompressionRequestBody) -> CompressionRequest:
    """Everything that can be said against it before any work is done. Raises InputError or TemplateError."""
    settings = services.settings
    if is_base_model(services, body.name):
        raise InputError("name", f"name: {shown(body.name)} is the name of the base model", code="name_taken")
    try:
        services.store.check_free(body.name)
    except SoftPromptError as error:
        raise InputError("name", str(error), code=error.code) from error
    wanted = make_settings(
        objective=body.objective,
        alpha=body.alpha,
        kind=body.kind,
        virtual_tokens=body.virtual_tokens,
        instruction=body.instruction,
        minutes=body.minutes,
        steps=body.steps,
        seed=body.seed,
        max_answer_tokens=body.answer_tokens,
        model_questions=body.model_questions,
    )
    max_bytes = settings.max_prompt_mib << 20
    request = make_request(
        name=body.name,
        context=body.context,
        settings=wanted,
        questions=tuple(
            Example(question.input, question.output, accept=tuple(question.accept)) for question in body.questions
        ),
        choice=lambda: _served(services),
        store=settings.prompt_store,
        max_prompt_bytes=max_bytes,
        keep_text=body.keep_text,
        recall=body.recall,
        preview=body.preview,
    )
    # The window is the model's own, which --max-model-len may cut short for requests.
    files = ModelFiles.served(request.choice, services.text.tokenizer)
    return PreparedRun.checked(request, files, settings.store_root, max_bytes).request


def _served(services: Services) -> ModelChoice:
    """Raises ApiError 503 while the engine is starting."""
    return served_choice(engine_info(services).model)


def _object(job: Job) -> CompressionJob:
    record, progress = job.record, job.progress
    return CompressionJob(
        id=record.id,
        status=record.status,
        name=record.name,
        created_at=record.created_at,
        started_at=record.started_at,
        finished_at=record.finished_at,
        progress=JobProgress(
            phase=progress.phase,
            done=progress.done,
            total=progress.total,
            loss=progress.loss,
            seconds_left=progress.seconds_left,
            elapsed=progress.elapsed,
            expected=progress.expected,
            note=progress.note,
        )
        if progress is not None
        else None,
        soft_prompt=record.soft_prompt,
        preview=record.name if record.preview is not None else None,
        fidelity=record.fidelity,
        error=JobErrorBody(code=record.error.code, message=record.error.message, param=record.error.param)
        if record.error is not None
        else None,
    )
