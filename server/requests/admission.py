"""The way of requests to the engine and back: a place in the queue, a hold on the soft prompt, and both given back.

Who is turned away, and why, is decided here: in `Admission.reserve`."""

from __future__ import annotations

import contextlib
import math
import time
import uuid
from collections.abc import AsyncGenerator, Iterator

from softbatch.scheduler.protocol import AddRequest, SamplingParams, SequenceOutput
from softbatch.server.observability.metrics import Metrics
from softbatch.server.observability.request_record import note_start, own_salt
from softbatch.server.request_failures import EngineAway, QueueFull, TooManySequences
from softbatch.server.requests.active_request import ActiveRequest
from softbatch.server.requests.engine_client import EngineClient
from softbatch.server.requests.leases import Lease, SoftPromptLeases


class Places:
    """Places held for requests that are being prepared, and the leases taken for them so far."""

    def __init__(self, leases: SoftPromptLeases, arrived: float) -> None:
        self._leases = leases
        self._arrived = arrived
        self.leased: list[Lease] = []

    async def lease(self, soft_prompt: str | None) -> Lease | None:
        """Raises UnknownSoftPrompt or UnusableSoftPrompt."""
        if not soft_prompt:
            return None
        lease = await self._leases.acquire(soft_prompt)
        self.leased.append(lease)
        return lease

    def prepare(
        self,
        token_ids: list[int],
        params: SamplingParams,
        lease: Lease | None,
        *,
        route: str,
        priority: int = 0,
        cache_salt: str = "",
        score_from: int | None = None,
        score_top: int = 0,
    ) -> ActiveRequest:
        add = AddRequest(
            request_id=uuid.uuid4().hex,
            token_ids=token_ids,
            params=params,
            soft_prompt=lease.ref if lease else None,
            priority=priority,
            cache_salt=own_salt(cache_salt),
            score_from=score_from,
            score_top=score_top,
        )
        return ActiveRequest.of(add, lease, route, self._arrived)


class Admission:
    """Prepares all requests of a caller before it submits the first; a failure before that leaves nothing held.

    At most `slots` + `max_waiting` requests are inside at any moment: those that are being prepared hold places, before
    any work is spent on them, and the others are active. That another engine is being started makes no difference.
    """

    def __init__(
        self, engine: EngineClient, leases: SoftPromptLeases, metrics: Metrics, *, slots: int, max_waiting: int
    ) -> None:
        self._engine = engine
        self._leases = leases
        self._metrics = metrics
        self._max_waiting = max_waiting
        self._capacity = slots + max_waiting
        self._reserved = 0
        self.draining = False

    @contextlib.contextmanager
    def reserve(self, count: int) -> Iterator[Places]:
        """Hold `count` places, one for each `submit` after the block. Raises QueueFull, EngineAway or
        TooManySequences."""
        self._take(count)
        places = Places(self._leases, time.monotonic())
        try:
            yield places
        except BaseException:
            self._reserved -= count
            for lease in places.leased:
                self._leases.release(lease)
            raise

    def _take(self, count: int) -> None:
        if self.draining or self._engine.has_ended:
            self._metrics.requests_rejected.labels("draining" if self.draining else "engine_away").inc(count)
            reason = "the server is shutting down" if self.draining else "the engine cannot be kept alive"
            raise EngineAway(f"{reason}; try again in a moment", retry_after=2)
        if count > self._capacity:
            raise TooManySequences(
                f"this asks for {count} sequences at once; the server takes {self._capacity} at the most"
            )
        if len(self._engine.active) + self._reserved + count > self._capacity:
            self._metrics.requests_rejected.labels("queue_full").inc(count)
            raise QueueFull(
                f"the waiting queue is full ({self._max_waiting} requests); try again later",
                retry_after=min(max(math.ceil(self._engine.seconds_to_drain), 1), 60),
            )
        self._reserved += count

    def submit(self, request: ActiveRequest) -> None:
        """Its reserved place becomes that of an active request."""
        self._reserved -= 1
        self._engine.submit(request)
        note_start(request)

    def outputs(self, request: ActiveRequest) -> AsyncGenerator[list[SequenceOutput], None]:
        """Raises Failure."""
        return self._engine.outputs(request)

    def cancel(self, request: ActiveRequest, reason: str) -> None:
        """Harmless when the request has ended."""
        self._engine.cancel(request, reason)

    def release(self, lease: Lease | None) -> None:
        """Once for each lease, when the last request that uses it has ended."""
        if lease is not None:
            self._leases.release(lease)
