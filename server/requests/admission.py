"""The way of requests to the engine and back: a place in the queue, a hold on the soft prompt, and both given back.

Who is turned away, and why, is decided here: in `Admission.reserve`."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import Counter
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from softbatch.scheduler.protocol import BACKGROUND, AddRequest, Pooling, SamplingParams, SequenceOutput
from softbatch.server.journal import open_sequence
from softbatch.server.observability.metrics import Metrics
from softbatch.server.observability.request_record import current, note_start, own_salt, share_owner
from softbatch.server.request_failures import EngineAway, QueueFull, TooManySequences
from softbatch.server.requests.active_request import ActiveRequest
from softbatch.server.requests.deadline import Deadline
from softbatch.server.requests.engine_client import EngineClient
from softbatch.server.requests.leases import Lease, SoftPromptLeases


class Places:
    """Places held for requests that are being prepared, and the leases taken for them so far."""

    def __init__(
        self, leases: SoftPromptLeases, arrived: float, deadline: Deadline | None, owner: str, weight: float
    ) -> None:
        self._leases = leases
        self._arrived = arrived
        self.deadline = deadline
        self._owner = owner
        self._weight = weight
        self.prompt_tokens = 0
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
        pooling: Pooling | None = None,
    ) -> ActiveRequest:
        """Raises SequenceChanged."""
        self.prompt_tokens += len(token_ids)
        opened = open_sequence(params.seed, token_ids, lease.stored.sha256 if lease else "")
        if opened.seed != params.seed:  # the one that another server has drawn
            params = msgspec.structs.replace(params, seed=opened.seed)
        add = AddRequest(
            request_id=opened.request_id,
            token_ids=token_ids,
            params=params,
            soft_prompt=lease.ref if lease else None,
            priority=priority + BACKGROUND if current().is_background else priority,
            owner=self._owner,
            weight=self._weight,
            cache_salt=own_salt(cache_salt),
            score_from=score_from,
            score_top=score_top,
            pooling=pooling,
            traced=current().is_traced,
        )
        return ActiveRequest.of(add, lease, route, self._arrived, self.deadline, opened)


@dataclass(frozen=True)
class AdmissionLimits:
    """`slots` sequences run at once, all else bounds those who wait behind them; None: no limit. `request_timeout`, in
    seconds, is for requests that bring none. `weights` are shares of owners, 1 for those that are not there."""

    slots: int
    max_waiting: int
    max_waiting_tokens: int | None = None
    max_waiting_per_owner: int | None = None
    request_timeout: float | None = None
    weights: Mapping[str, float] = field(default_factory=dict)


# Longer than whoever is told to ask again in a second takes for that.
SECONDS_TO_ASK_AGAIN = 3.0


class Admission:
    """Prepares all requests of a caller before it submits the first; a failure before that leaves nothing held.

    At most `slots` + `max_waiting` requests are inside at any moment: those that are being prepared hold places, before
    any work is spent on them, and the others are active. That another engine is being started makes no difference.
    What is asked in the background has places of its own, as many as there are slots, and takes nobody's.
    """

    def __init__(
        self, engine: EngineClient, leases: SoftPromptLeases, metrics: Metrics, limits: AdmissionLimits
    ) -> None:
        self._engine = engine
        self._leases = leases
        self._metrics = metrics
        self._limits = limits
        self._capacity = limits.slots + limits.max_waiting
        self._reserved: Counter[str] = Counter()  # by owner
        self._reserved_background = 0
        self._large, self._large_until = 0, 0.0  # the most places that somebody in the background asks for in vain
        self.draining = False

    @contextlib.contextmanager
    def reserve(
        self, count: int, timeout: float | None = None, user: str = "", deadline: Deadline | None = None
    ) -> Iterator[Places]:
        """Hold `count` places, one for each `submit` after the block. `timeout` None: the server's own, which may be
        none. Whoever goes on with what has a deadline already brings that instead. Raises QueueFull, EngineAway or
        TooManySequences."""
        owner, is_background = share_owner(user), current().is_background
        self._take(count, owner, is_background)
        now = time.monotonic()
        default = None if is_background else self._limits.request_timeout
        seconds = default if timeout is None else timeout
        if deadline is None and seconds is not None:
            deadline = Deadline(now + seconds, seconds)
        places = Places(self._leases, now, deadline, owner, self._limits.weights.get(owner, 1.0))
        try:
            yield places
            if not is_background:
                self._check_tokens(count, places.prompt_tokens)
        except BaseException:
            self._give_back(count, owner, is_background)
            for lease in places.leased:
                self._leases.release(lease)
            raise

    def check_room(self, count: int = 1) -> None:
        """Whether so many places are left, whosever. Raises QueueFull or EngineAway."""
        self._check_engine(count)
        if len(self._engine.active) - self._engine.num_background + self._reserved.total() + count > self._capacity:
            raise self._full(count, "queue_full", f"the waiting queue is full ({self._limits.max_waiting} requests)")

    def _check_engine(self, count: int) -> None:
        if self.draining or self._engine.has_ended:
            self._metrics.requests_rejected.labels("draining" if self.draining else "engine_away").inc(count)
            reason = "the server is shutting down" if self.draining else "the engine cannot be kept alive"
            raise EngineAway(f"{reason}; try again in a moment", retry_after=2)

    def _check_background_room(self, count: int) -> None:
        """Whoever finds nothing else in the background is let in. As long as a large one asks again and again, smaller
        ones are not, or it would never find that."""
        self._check_engine(count)
        others, now = self._engine.num_background + self._reserved_background, time.monotonic()
        if now > self._large_until:
            self._large = 0
        has_room = not others or others + count <= self._limits.slots
        if count >= self._large:
            self._large = 0 if has_room else count
            self._large_until = now + SECONDS_TO_ASK_AGAIN
        if not has_room or count < self._large:
            raise QueueFull("there is no room in the background; try again later", retry_after=1)

    async def until_room(self, count: int) -> None:
        """In the background, as long as it has no room for so many; others hear of that when they take theirs. Raises
        EngineAway."""
        while current().is_background:
            try:
                return self._check_background_room(count)
            except QueueFull as full:
                await asyncio.sleep(full.retry_after or 1)

    def _take(self, count: int, owner: str, is_background: bool) -> None:
        if count > self._capacity:
            raise TooManySequences(
                f"this asks for {count} sequences at once; the server takes {self._capacity} at the most"
            )
        if is_background:
            self._check_background_room(count)
            self._reserved_background += count
            return
        self.check_room(count)
        most = self._limits.max_waiting_per_owner
        if most is not None:
            own = sum(1 for request in self._waiting() if request.add.owner == owner) + self._reserved[owner]
            if own + count - self._free_slots > most:
                raise self._full(count, "key_queue_full", f"of this key or user {most} requests may wait, not more")
        self._check_tokens(count)
        self._reserved[owner] += count

    def _check_tokens(self, count: int, prompt_tokens: int = 1) -> None:
        """Looked at twice: before any work, and when the tokens are counted. Whoever finds nobody waiting is let in,
        for a prompt longer than the limit would otherwise never be."""
        most = self._limits.max_waiting_tokens
        if most is not None:
            behind = list(self._waiting())[self._free_slots :]
            waiting = sum(request.prompt_tokens for request in behind)
            if waiting and waiting + prompt_tokens > most:
                raise self._full(count, "queue_tokens", f"the waiting queue is full ({most} prompt tokens)")

    def _full(self, count: int, reason: str, message: str) -> QueueFull:
        self._metrics.requests_rejected.labels(reason).inc(count)
        seconds = math.ceil(self._engine.seconds_to_drain)
        return QueueFull(f"{message}; try again later", retry_after=min(max(seconds, 1), 60))

    def _waiting(self) -> Iterator[ActiveRequest]:
        return (request for request in self._engine.waiting() if not request.is_background)

    @property
    def _free_slots(self) -> int:
        """Those of the background are left to whoever comes."""
        active = len(self._engine.active) - self._engine.num_background
        return max(0, self._limits.slots - active + sum(1 for _ in self._waiting()))

    def _give_back(self, count: int, owner: str, is_background: bool) -> None:
        if is_background:
            self._reserved_background -= count
            return
        self._reserved[owner] -= count
        if not self._reserved[owner]:
            del self._reserved[owner]

    def submit(self, request: ActiveRequest) -> None:
        """Its reserved place becomes that of an active request."""
        self._give_back(1, request.add.owner, request.is_background)
        self._engine.submit(request)
        note_start(request)

    async def run(self, requests: Sequence[ActiveRequest]) -> list[SequenceOutput]:
        """Submit requests without output, and wait for what is reported of each. All leave the engine with the caller,
        or when one fails. Raises Failure."""
        for request in requests:
            self.submit(request)
        waits = [asyncio.ensure_future(self._report(request)) for request in requests]
        try:
            return await asyncio.gather(*waits)
        finally:
            for request, wait in zip(requests, waits, strict=True):
                self.cancel(request, "cancelled")
                wait.cancel()
            await asyncio.gather(*waits, return_exceptions=True)

    async def _report(self, request: ActiveRequest) -> SequenceOutput:
        return [outputs[-1] async for outputs in self.outputs(request)][-1]

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
