"""Carries requests to the engine and its steps back to those who wait for them."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable

from softbatch.scheduler.protocol import (
    CancelRequest,
    ForgetSoftPrompt,
    Ready,
    SequenceOutput,
    StepOutput,
)
from softbatch.server.observability.metrics import Metrics
from softbatch.server.request_failures import EngineAway, EngineRestarted, RequestFailed
from softbatch.server.requests.active_request import ActiveRequest
from softbatch.server.requests.engine_supervisor import EngineSupervisor


class EngineClient:
    """Owns the list of active requests; how many there may be is up to `Admission`."""

    def __init__(self, supervisor: EngineSupervisor, metrics: Metrics) -> None:
        self._supervisor = supervisor
        self._metrics = metrics
        self._starts = 0
        self._seconds_per_request = 1.0
        self._last_finish = time.monotonic()
        self.active: dict[str, ActiveRequest] = {}
        self.on_give_up: Callable[[], None] = lambda: None

    @property
    def is_ready(self) -> bool:
        return self._supervisor.ready

    @property
    def num_waiting(self) -> int:
        return sum(1 for request in list(self.active.values()) if request.state == "waiting")

    @property
    def num_running(self) -> int:
        return len(self.active) - self.num_waiting

    @property
    def seconds_to_drain(self) -> float:
        """How long those who wait will take to be served, at the pace of the last ones."""
        return self._seconds_per_request * max(1, self.num_waiting)

    def submit(self, request: ActiveRequest) -> None:
        if not self._supervisor.ready:
            request.error = EngineAway("the engine is restarting; try again in a moment")
            request.changed.set()
            return
        self.active[request.request_id] = request
        self._supervisor.send(request.add)

    def cancel(self, request: ActiveRequest, reason: str) -> None:
        """Take a request out if it is still active; it leaves the batch before the next step."""
        if self.active.pop(request.request_id, None) is not None:
            self._count_end(request, reason, time.monotonic())
            if self._supervisor.ready:
                self._supervisor.send(CancelRequest([request.request_id]))

    async def outputs(self, request: ActiveRequest) -> AsyncGenerator[list[SequenceOutput], None]:
        """Everything that came since the last look, merged when the reader is slow. Raises Failure."""
        while True:
            await request.changed.wait()
            request.changed.clear()
            batch, request.outputs = request.outputs, []
            if batch and batch[-1].finish_reason != "error":
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
        for request in list(self.active.values()):
            request.error = EngineRestarted(message, retry_after=2)
            request.changed.set()
            self._count_end(request, "error", time.monotonic())
        self.active.clear()

    def engine_started(self, info: Ready) -> None:
        self._metrics.engine_started(info, self._supervisor.config.max_batch_size)
        if self._starts:
            self._metrics.engine_restarts.inc()
        self._starts += 1

    def engine_died(self) -> None:
        self.fail_all("the engine restarted while this request ran; send it again")

    def engine_given_up(self) -> None:
        self.on_give_up()

    def engine_stepped(self, output: StepOutput) -> None:
        now = time.monotonic()
        self._metrics.observe_step(output)
        for request_id in output.preempted:
            if request := self.active.get(request_id):
                request.state = "waiting"
                request.num_computed = 0
        for request_id in output.admitted:
            if request := self.active.get(request_id):
                self._admit(request, now)
        for sequence in output.outputs:
            if request := self.active.get(sequence.request_id):
                self._deliver(request, sequence, now)

    def _admit(self, request: ActiveRequest, now: float) -> None:
        request.state = "running"
        if request.started is None:
            request.started = now
            self._metrics.queue_time.observe(now - request.arrived)
            self._metrics.prompt_tokens.inc(request.prompt_tokens)
            if request.virtual_tokens:
                self._metrics.virtual_tokens.inc(request.virtual_tokens)
                saved = request.context_tokens - request.virtual_tokens
                self._metrics.context_tokens_saved.inc(max(0, saved))

    def _deliver(self, request: ActiveRequest, output: SequenceOutput, now: float) -> None:
        request.num_computed = output.num_computed
        if output.token_ids:
            self._metrics.generation_tokens.inc(len(output.token_ids))
            if request.last_token is None:
                request.first_token = now
                self._metrics.first_token.observe(now - request.arrived)
            else:
                self._metrics.between_tokens.observe((now - request.last_token) / len(output.token_ids))
            request.last_token = now
            request.received += output.token_ids
        if output.finish_reason is not None:
            del self.active[request.request_id]
            self._count_end(request, output.finish_reason, now)
            if output.finish_reason == "error":
                request.error = RequestFailed(output.error or "the request failed")
        if output.token_ids or output.finish_reason is not None:
            request.outputs.append(output)
            request.changed.set()

    def _count_end(self, request: ActiveRequest, reason: str, now: float) -> None:
        self._metrics.requests_finished.labels(reason).inc()
        self._metrics.whole_request.observe(now - request.arrived)
        # The pace of a busy server: idle time before the request came does not count.
        seconds = min(now - self._last_finish, now - request.arrived)
        self._seconds_per_request += 0.1 * (seconds - self._seconds_per_request)
        self._last_finish = now
