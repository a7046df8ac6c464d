"""Carries requests to the engine and its steps back to those who wait for them."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncGenerator, Callable, Iterator

from softbatch.scheduler.protocol import (
    CancelRequest,
    EngineStats,
    ForgetSoftPrompt,
    Ready,
    SequenceOutput,
    StepOutput,
)
from softbatch.server.observability.metrics import Metrics
from softbatch.server.request_failures import (
    DeadlineExceeded,
    EngineGone,
    Failure,
    RequestCancelled,
    RequestFailed,
    RequestKillsEngine,
)
from softbatch.server.requests.active_request import ActiveRequest
from softbatch.server.requests.engine_supervisor import EngineSupervisor
from softbatch.server.requests.quarantine import Quarantine

logger = logging.getLogger(__name__)


class EngineClient:
    """Owns the list of active requests; how many there may be is up to `Admission`.

    A request outlives the engine that serves it: when that dies, its requests are held back and sent to the next one.
    """

    def __init__(self, supervisor: EngineSupervisor, metrics: Metrics) -> None:
        self._supervisor = supervisor
        self._metrics = metrics
        self._quarantine = Quarantine(supervisor.config.max_batch_size)
        self._by_sequence: dict[str, ActiveRequest] = {}
        self._died: float | None = None
        self._seconds_per_request = 1.0
        self._last_finish = time.monotonic()
        self.active: dict[str, ActiveRequest] = {}
        self.num_background = 0  # of the active ones
        self.resident: frozenset[str] = frozenset()  # content hashes of the soft prompts in the engine's KV blocks
        self._stats: EngineStats | None = None
        self.on_give_up: Callable[[], None] = lambda: None

    @property
    def has_ended(self) -> bool:
        """Whether there will be no engine any more."""
        return self._supervisor.gave_up

    @property
    def room_for_soft_prompts(self) -> float:
        """For how many more, as large as those that are resident on average, beside what requests use now, or as much
        as one of them would if that is more: requests that find no blocks evict. Infinite if nothing is known."""
        stats, info = self._stats, self._supervisor.info
        if stats is None or info is None or not stats.soft_prompts_resident:
            return math.inf
        of_soft_prompts = stats.soft_prompt_resident_bytes * info.num_blocks / info.kv_bytes
        each = of_soft_prompts / stats.soft_prompts_resident
        of_requests = max(each, stats.kv_blocks_used - of_soft_prompts)
        return max(0, int((info.num_blocks - of_soft_prompts - of_requests) / each + 1e-6))

    def waiting(self) -> Iterator[ActiveRequest]:
        """In the order of submission."""
        return (request for request in list(self.active.values()) if request.state == "waiting")

    def without_first_token(self) -> Iterator[ActiveRequest]:
        """Who wait for it, in the queue or while their prompts are computed; not those that get none."""
        return (
            request
            for request in list(self.active.values())
            if request.first_token is None and request.add.params.max_tokens > 0
        )

    @property
    def num_waiting(self) -> int:
        return sum(1 for _ in self.waiting())

    @property
    def num_running(self) -> int:
        return len(self.active) - self.num_waiting

    @property
    def seconds_to_drain(self) -> float:
        """How long those who wait will take to be served, at the pace of the last ones; not those in the background."""
        return self._seconds_per_request * max(1, sum(1 for request in self.waiting() if not request.is_background))

    def submit(self, request: ActiveRequest) -> None:
        """While the engine is away, or one request is on trial, it is held back; its deadline runs on. The engine
        is not told of what has ended on another server."""
        if request.has_ended_elsewhere:
            return
        self.active[request.request_id] = request
        request.submitted = time.monotonic()
        self.num_background += request.is_background
        if request.deadline is not None:
            left = request.deadline.at - time.monotonic()
            if left <= 0:
                self._expire(request)
                return
            request.alarm = asyncio.get_running_loop().call_later(left, self._expire, request)
        if self._supervisor.ready and self._quarantine.on_trial is None:
            self._send(request)

    def cancel(self, request: ActiveRequest, reason: str) -> None:
        """Take a request out if it is still active; it leaves the batch before the next step."""
        if request.request_id in self.active:
            self._recall(request)
            self._remove(request, reason, time.monotonic())

    def take_out(self, request: ActiveRequest) -> None:
        """Cancel an active request for somebody else than its client, who is told so."""
        self._recall(request)
        self._fail(request, RequestCancelled(), "cancelled")

    async def outputs(self, request: ActiveRequest) -> AsyncGenerator[list[SequenceOutput], None]:
        """Everything that came since the last look, merged when the reader is slow. Raises Failure."""
        for batch in request.resumed:
            yield batch
        while not request.has_ended_elsewhere:
            await request.changed.wait()
            request.changed.clear()
            batch, request.outputs = request.outputs, []
            if batch and batch[-1].finish_reason != "error":
                if request.journal is not None:
                    request.journal.bring(request.place, batch)
                yield batch
                if batch[-1].finish_reason is not None:
                    return
            if request.error is not None:
                raise request.error

    def forget_soft_prompt(self, sha256: str) -> None:
        """No request names it any more, nor will: the engine gives up its KV blocks."""
        if self._supervisor.ready:
            self._supervisor.send(ForgetSoftPrompt(sha256))

    def fail_all(self, message: str) -> None:
        """Answer every active request with 503."""
        self._quarantine.on_trial = None
        for request in list(self.active.values()):
            self._fail(request, EngineGone(message, retry_after=2))

    def engine_started(self, info: Ready) -> None:
        self._metrics.engine_started(info, self._supervisor.config.max_batch_size)
        if self._died is not None:
            pause = time.monotonic() - self._died
            self._metrics.engine_restarts.inc()
            self._metrics.engine_pause.observe(pause)
            logger.info("the engine is back after %.1f s; %d requests go on", pause, len(self.active))
        self._send_held()

    def engine_died(self) -> None:
        """Nothing of a request is lost: another engine goes on behind what this one has generated."""
        self._died = time.monotonic()
        convicted = self._quarantine.engine_died(self.active.values(), self._died)
        self._by_sequence.clear()
        self.resident = frozenset()
        for request in self.active.values():
            request.end_sequence()
        if convicted is not None:
            logger.error("request %s is given up: %d engines have died on it", convicted.request_id, convicted.deaths)
            self._fail(convicted, RequestKillsEngine(convicted.deaths))

    def engine_given_up(self, reason: str) -> None:
        self.fail_all(f"{reason}; the server ends")
        self.on_give_up()

    def engine_admitting(self, sequence_ids: list[str]) -> None:
        now = time.monotonic()
        for sequence_id in sequence_ids:
            if request := self._by_sequence.get(sequence_id):
                self._admit(request, now)

    def engine_stepped(self, output: StepOutput) -> None:
        now = time.monotonic()
        self._metrics.observe_step(output)
        self._stats = output.stats
        if output.resident is not None:
            self.resident = frozenset(output.resident)
        for sequence_id in output.preempted:
            if request := self._by_sequence.get(sequence_id):
                request.state = "waiting"
                request.num_computed = 0
        for moment in output.moments:
            if request := self._by_sequence.get(moment.request_id):
                request.moments.append(moment)
        for sequence in output.outputs:
            if request := self._by_sequence.get(sequence.request_id):
                self._deliver(request, sequence, now)
        on_trial = self._quarantine.on_trial
        if on_trial is not None and self._quarantine.has_survived(on_trial, now):
            on_trial.deaths = 0
            self._recall(on_trial)
            self._send_held()

    def _send(self, request: ActiveRequest) -> None:
        if request.num_sequences:
            self._metrics.requests_resumed.inc()
        self._supervisor.send(request.start_sequence())
        assert request.sequence_id is not None
        self._by_sequence[request.sequence_id] = request

    def _send_held(self) -> None:
        if self._supervisor.ready:
            for request in self._quarantine.next_to_run(self.active.values()):
                self._send(request)

    def _recall(self, request: ActiveRequest) -> None:
        """Take it out of the engine; it keeps what it has received."""
        if request.sequence_id is not None:
            del self._by_sequence[request.sequence_id]
            if self._supervisor.ready:
                self._supervisor.send(CancelRequest([request.sequence_id]))
            request.end_sequence()

    def _expire(self, request: ActiveRequest) -> None:
        """Its deadline has passed: it leaves the engine, and ends with the output so far, if there is any."""
        deadline = request.deadline
        if deadline is None or request.request_id not in self.active:
            return
        num_computed = request.num_computed
        self._recall(request)
        if not deadline.has_output:
            self._fail(request, DeadlineExceeded(deadline.seconds), "expired")
            return
        request.outputs.append(SequenceOutput(request.request_id, num_computed, finish_reason="timeout"))
        request.changed.set()
        self._remove(request, "timeout", time.monotonic())

    def _fail(self, request: ActiveRequest, failure: Failure, reason: str = "error") -> None:
        request.error = failure
        request.changed.set()
        self._remove(request, reason, time.monotonic())

    def _remove(self, request: ActiveRequest, reason: str, now: float) -> None:
        del self.active[request.request_id]
        self.num_background -= request.is_background
        if request.alarm is not None:
            request.alarm.cancel()
        if request.sequence_id is not None:
            self._by_sequence.pop(request.sequence_id, None)
        self._count_end(request, reason, now)
        if request is self._quarantine.on_trial:
            self._send_held()

    def _admit(self, request: ActiveRequest, now: float) -> None:
        request.state = "running"
        self._quarantine.admitted(request)
        if request.started is None:
            request.started = now
            if not request.is_background:
                self._metrics.queue_time.observe(now - request.arrived)
            self._metrics.prompt_tokens.inc(request.prompt_tokens)
            if request.virtual_tokens:
                self._metrics.virtual_tokens.inc(request.virtual_tokens)
                saved = request.context_tokens - request.virtual_tokens
                self._metrics.context_tokens_saved.inc(max(0, saved))

    def _deliver(self, request: ActiveRequest, output: SequenceOutput, now: float) -> None:
        request.num_computed = output.num_computed
        if request.num_sequences == 1:  # later ones find what the first has computed
            request.num_cached = output.num_cached
        if output.token_ids:
            if request.deadline is not None:
                request.deadline.has_output = True
            if request.alive_since is None:
                request.alive_since = now
            self._metrics.generation_tokens.inc(len(output.token_ids))
            if request.last_token is None:
                request.first_token = now
                if not request.is_background:
                    self._metrics.first_token.observe(now - request.arrived)
            elif not request.is_background:
                self._metrics.between_tokens.observe((now - request.last_token) / len(output.token_ids))
            request.last_token = now
            request.received += output.token_ids
        if output.finish_reason is not None:
            if output.finish_reason == "error":
                request.error = RequestFailed(output.error or "the request failed")
            self._remove(request, output.finish_reason, now)
        if output.token_ids or output.finish_reason is not None:
            request.outputs.append(output)
            request.changed.set()

    def _count_end(self, request: ActiveRequest, reason: str, now: float) -> None:
        request.end_reason = reason
        self._metrics.requests_finished.labels(reason).inc()
        if request.is_background:
            return  # nobody waits for it: neither latency nor pace of those who do is told by it
        if reason not in ("cancelled", "error", "expired", "timeout"):
            self._metrics.whole_request.observe(now - request.arrived)
        if request.started is None:
            return  # Whoever leaves the queue unserved says nothing about the pace.
        # The pace of a busy server: idle time before the request came does not count.
        seconds = min(now - self._last_finish, now - request.arrived)
        self._seconds_per_request += 0.1 * (seconds - self._seconds_per_request)
        self._last_finish = now
