"""`/health*` and `/ping`: the only routes that need no API key."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from softbatch.server.http.errors import unavailable
from softbatch.server.routes.common import json_reply, services_of
from softbatch.server.schemas.base import ERROR_REPLIES
from softbatch.server.schemas.info import Health

router = APIRouter(tags=["health"], responses=ERROR_REPLIES)


@router.get("/ping", response_model=Health, summary="The same for platforms that call it so (SageMaker)")
@router.get("/health", response_model=Health, summary="Is a step being made?")
async def health(request: Request) -> Response:
    """200 only if the engine is there and was heard of lately: it reports every step, and each second a heartbeat."""
    engine = services_of(request).supervisor
    if engine.gave_up:
        raise unavailable("the engine cannot be kept alive; the server ends", code="engine_gone")
    if not engine.ready:
        raise unavailable("another engine is being started; requests wait for it", code="restarting")
    if engine.complaint:
        raise unavailable(engine.complaint, code="stalled")
    return json_reply(Health())


@router.get("/health/live", response_model=Health, summary="Does the process answer?")
async def live() -> Response:
    """200 as soon as the server listens, whatever the engine does."""
    return json_reply(Health())


@router.get("/health/ready", response_model=Health, summary="Should it get requests?")
async def ready(request: Request) -> Response:
    """503 while starting, while another engine is started, or while the last requests are finished before the end.

    Requests that come while another engine is started are answered, as soon as it is there.
    """
    if services_of(request).admission.draining:
        raise unavailable("the server is shutting down", code="draining")
    return await health(request)
