"""`/v1/queue`: the running batch and the waiting queue, live; a look at one request, and its end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import fields
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from fastapi import APIRouter, Request, Response

from softbatch.server.http.errors import ApiError
from softbatch.server.http.sse import EventStream
from softbatch.server.observability.history import HistorySample
from softbatch.server.request_failures import shown
from softbatch.server.routes.common import json_reply, services_of, visible_owner
from softbatch.server.schemas.base import ERROR_REPLIES, ERRORS_OF_STREAMS
from softbatch.server.schemas.queue import (
    LiveHistory,
    LiveQueue,
    Queue,
    QueueCancelled,
    QueueEntry,
    QueueRequest,
    RequestProgress,
)
from softbatch.server.services import Services

if TYPE_CHECKING:
    from softbatch.server.requests.active_request import ActiveRequest

router = APIRouter(prefix="/v1/queue", tags=["queue"], responses=ERROR_REPLIES)
MAX_SHOWN_TOKENS = 4096
# Of each list in an event, five of which may come a second.
MAX_LIVE_ENTRIES = 128


@router.get("", response_model=Queue, summary="Every running and waiting request")
async def get_queue(request: Request) -> Response:
    """With its age, its soft prompt and how far it has come; `waiting` is in order of priority and arrival."""
    services = services_of(request)
    return json_reply(_queue(services, *_sorted(services, visible_owner(services))))


@router.get(
    "/events",
    status_code=200,
    response_class=EventStream,
    responses={200: {"model": LiveQueue}, **ERRORS_OF_STREAMS},
    summary="The same live, with figures",
)
async def get_queue_events(request: Request) -> Response:
    """Server-sent events: one at once, with the figures of the last ten minutes, then one whenever something has
    changed, five a second at most. However many watch, the server looks once, and never asks the engine."""
    services = services_of(request)
    owner = visible_owner(services)

    async def events() -> AsyncGenerator[str | bytes, None]:
        shown_until, last = 0.0, b""
        async for beat in services.live.watch():
            since = shown_until
            new = services.live.history.since(since)
            event = beat.shared((owner, since), partial(_live, services, owner, new))
            if event != last:
                yield event
            last, shown_until = event, new[-1].at if new else since

    return EventStream(events(), (), f"{router.prefix}/events")


@router.get("/{id}", response_model=QueueRequest, summary="One running or waiting request, with its text")
async def get_queued_request(request: Request, id: str) -> Response:
    services = services_of(request)
    active = _find(services, id)
    prompt, output = active.token_ids[-MAX_SHOWN_TOKENS:], active.received[-MAX_SHOWN_TOKENS:]
    texts = await asyncio.to_thread(lambda: [services.text.decode(ids, False) for ids in (prompt, output)])
    is_cut = len(prompt) < active.prompt_tokens or len(output) < active.generated
    return json_reply(QueueRequest(**_fields(active), prompt=texts[0], output=texts[1], is_cut=is_cut))


@router.delete("/{id}", response_model=QueueCancelled, summary="Cancel a running or waiting request")
async def cancel_queued_request(request: Request, id: str) -> Response:
    """Its client gets an error with the code `request_cancelled`, and with it all choices of the same HTTP request
    end. Where several API keys are set, a key cancels its own requests, and an admin key any."""
    services = services_of(request)
    services.engine.take_out(_find(services, id))
    return json_reply(QueueCancelled(id=id))


def _find(services: Services, request_id: str) -> ActiveRequest:
    """Raises ApiError 404, also for another key's request."""
    active = services.engine.active.get(request_id)
    owner = visible_owner(services)
    if active is None or owner not in (None, active.owner):
        message = f"no request {shown(request_id)} runs or waits; GET /v1/queue lists those that do"
        raise ApiError(404, message, param="id", code="request_not_found")
    return active


def _sorted(services: Services, owner: str | None) -> tuple[list[ActiveRequest], list[ActiveRequest]]:
    """The running and the waiting requests of the owner."""
    own = [entry for entry in services.engine.active.values() if owner in (None, entry.owner)]
    running = [entry for entry in own if entry.state == "running"]
    # `active` is in the order of submission. The scheduler may take a short prompt before a long one.
    waiting = sorted((entry for entry in own if entry.state == "waiting"), key=lambda entry: entry.priority)
    return sorted(running, key=lambda entry: entry.started or 0.0), waiting


def _queue(
    services: Services, running: list[ActiveRequest], waiting: list[ActiveRequest], most: int | None = None
) -> Queue:
    engine = services.engine
    return Queue(
        slots=services.settings.max_batch_size,
        running=[QueueEntry(**_fields(entry)) for entry in running[:most]],
        waiting=[QueueEntry(**_fields(entry)) for entry in waiting[:most]],
        others_running=engine.num_running - len(running),
        others_waiting=engine.num_waiting - len(waiting),
    )


def _live(services: Services, owner: str | None, new: Sequence[HistorySample]) -> bytes:
    running, waiting = _sorted(services, owner)
    columns = {column.name: [getattr(sample, column.name) for sample in new] for column in fields(HistorySample)}
    live = LiveQueue(
        engine=_engine_state(services),
        num_running=len(running),
        num_waiting=len(waiting),
        queue=_queue(services, running, waiting, MAX_LIVE_ENTRIES),
        history=LiveHistory(**columns),
    )
    return live.model_dump_json().encode()


def _engine_state(services: Services) -> Literal["ready", "restarting", "stalled", "draining"]:
    if services.admission.draining:
        return "draining"
    if not services.supervisor.ready:
        return "restarting"
    return "stalled" if services.supervisor.complaint else "ready"


def _fields(active: ActiveRequest) -> dict[str, Any]:
    return {
        "id": active.request_id,
        "state": active.state,
        "route": active.route,
        "age_seconds": round(time.monotonic() - active.arrived, 3),
        "priority": active.priority,
        "soft_prompt": active.soft_prompt,
        "prompt_tokens": active.prompt_tokens,
        "virtual_tokens": active.virtual_tokens,
        "progress": RequestProgress(
            num_computed=active.num_computed, generated=active.generated, max_tokens=active.max_tokens
        ),
    }
