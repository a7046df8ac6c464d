"""Waiting for a job to change."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable

from softbatch.server.compressions.record import Job

SECONDS_BETWEEN_LOOKS = 1.0


async def watch(job: Job, is_draining: Callable[[], bool]) -> AsyncGenerator[Job, None]:
    """The job whenever it has changed, up to its final state; ends early only when the server stops."""
    seen = -1
    while True:
        if job.version != seen:
            seen = job.version
            yield job
        if job.is_final or is_draining():
            return
        if job.version == seen:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(job.changed.wait(), SECONDS_BETWEEN_LOOKS)
