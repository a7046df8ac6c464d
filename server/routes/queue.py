"""`GET /v1/queue`: the running batch and the waiting queue, live."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from fastapi import APIRouter, Request, Response

from softbatch.server.observability.request_record import current
from softbatch.server.routes.common import json_reply, services_of
from softbatch.server.schemas.base import ERROR_REPLIES
from softbatch.server.schemas.info import Queue, QueueEntry, RequestProgress

if TYPE_CHECKING:
    from softbatch.server.requests.active_request import ActiveRequest

router = APIRouter(tags=["queue"], responses=ERROR_REPLIES)


@router.get("/v1/queue", response_model=Queue, summary="Every running and waiting request")
async def get_queue(request: Request) -> Response:
    """With its age, its soft prompt and how far it has come; `waiting` is in order of priority and arrival."""
    services = services_of(request)
    active = list(services.engine.active.values())
    record = current()
    # Keys without admins among them are equals, each with requests of its own.
    sees_all = not record.owner or (record.is_admin and bool(services.settings.admin_key))
    own = [entry for entry in active if sees_all or entry.owner == record.owner]
    running = [entry for entry in own if entry.state == "running"]
    waiting = [entry for entry in own if entry.state == "waiting"]
    all_running = sum(entry.state == "running" for entry in active)
    return json_reply(
        Queue(
            slots=services.settings.max_batch_size,
            running=[_entry(entry) for entry in sorted(running, key=lambda entry: entry.started or 0.0)],
            # `active` is in the order of submission. The scheduler may take a short prompt before a long one.
            waiting=[_entry(entry) for entry in sorted(waiting, key=lambda entry: entry.priority)],
            others_running=all_running - len(running),
            others_waiting=len(active) - all_running - len(waiting),
        )
    )


def _entry(active: ActiveRequest) -> QueueEntry:
    return QueueEntry(
        id=active.request_id,
        state=active.state,
        route=active.route,
        age_seconds=round(time.monotonic() - active.arrived, 3),
        priority=active.priority,
        soft_prompt=active.soft_prompt,
        prompt_tokens=active.prompt_tokens,
        virtual_tokens=active.virtual_tokens,
        progress=RequestProgress(
            num_computed=active.num_computed, generated=active.generated, max_tokens=active.max_tokens
        ),
    )
