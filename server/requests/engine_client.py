"""Starts, watches and restarts the engine process; carries requests to it and its steps back."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import sys
import time
from collections.abc import AsyncGenerator, Callable
from pathlib import Path

import msgspec
import zmq
import zmq.asyncio

import softbatch
from softbatch.scheduler.protocol import (
    CancelRequest,
    EngineConfig,
    EngineInput,
    EngineOutput,
    EngineStats,
    ForgetSoftPrompt,
    Ready,
    SequenceOutput,
    StartupFailed,
    StartupPhase,
    StepOutput,
)
from softbatch.server.observability.metrics import Metrics
from softbatch.server.request_failures import EngineAway, EngineRestarted, QueueFull, RequestFailed, TooManySequences
from softbatch.server.requests.active_request import ActiveRequest

logger = logging.getLogger(__name__)
PROJECT = Path(softbatch.__file__).resolve().parents[1]  # where `-m softbatch…` finds the code
MAX_FAILED_RESTARTS = 5
# A step may take long on a slow machine; silence longer than this means that no step is being made.
SILENCE_SECONDS = 30.0


class StartupError(Exception):
    """The engine cannot start; the message is one line that says what to change."""


class EngineClient:
    """Owns the engine process, its sockets in `directory`, and the list of active requests.

    At most `max_batch_size` + `max_queue_size` requests are inside at any moment; places are reserved before any
    work is spent on a request.
    """

    def __init__(self, config: EngineConfig, directory: Path, metrics: Metrics) -> None:
        self._config = config
        self._directory = directory
        self._metrics = metrics
        self._context = zmq.asyncio.Context()
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(EngineOutput)
        self._process: asyncio.subprocess.Process | None = None
        self._inbox: zmq.asyncio.Socket | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._generation = 0
        self._reserved = 0
        self._last_message = time.monotonic()
        self._seconds_per_request = 1.0
        self._last_finish = time.monotonic()
        self.active: dict[str, ActiveRequest] = {}
        self.info: Ready | None = None
        self.stats: EngineStats | None = None
        self.ready = False
        self.draining = False
        self.gave_up = False
        self.restarts = 0
        self.on_give_up: Callable[[], None] = lambda: None

    # --- life of the engine process -------------------------------------------------------------------------

    async def start(self) -> Ready:
        """Start the engine and wait until it takes requests. Raises StartupError."""
        outbox = await self._spawn()
        info = await self._await_ready(outbox)
        self._supervisor = asyncio.create_task(self._supervise(outbox))
        return info

    async def stop(self) -> None:
        """End the engine process; whatever is still active is answered with 503."""
        self.draining = True
        if self._supervisor is not None:
            self._supervisor.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._supervisor
        await self._end_process()
        self._fail_all("the server is shutting down")
        self._context.destroy(linger=0)

    @property
    def last_message_age(self) -> float:
        """Seconds since the engine was last heard of."""
        return time.monotonic() - self._last_message

    @property
    def healthy(self) -> bool:
        """A step or a heartbeat came lately."""
        return self.ready and self.last_message_age < SILENCE_SECONDS

    async def _spawn(self) -> zmq.asyncio.Socket:
        """A fresh process with fresh sockets, so that nothing of an earlier engine's is mistaken for its own."""
        self._generation += 1
        inbox, outbox = self._context.socket(zmq.PUSH), self._context.socket(zmq.PULL)
        names = {}
        for name, socket in (("inbox", inbox), ("outbox", outbox)):
            socket.set_hwm(0)
            socket.setsockopt(zmq.LINGER, 0)
            names[name] = f"ipc://{self._directory}/{name}-{self._generation}"
            socket.bind(names[name])
        config = msgspec.structs.replace(self._config, **names, started_at=time.monotonic())
        self._inbox = inbox
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "softbatch.scheduler.engine.process",
            msgspec.json.encode(config).decode(),
            stdin=asyncio.subprocess.PIPE,
            cwd=PROJECT,
        )
        return outbox

    async def _await_ready(self, outbox: zmq.asyncio.Socket) -> Ready:
        process = self._process
        assert process is not None
        died = asyncio.create_task(process.wait())
        try:
            while True:
                received = asyncio.ensure_future(outbox.recv())
                await asyncio.wait({received, died}, return_when=asyncio.FIRST_COMPLETED)
                if not received.done():
                    received.cancel()
                    raise StartupError(f"the engine process ended with status {process.returncode} while starting")
                message = self._decoder.decode(received.result())
                if isinstance(message, StartupPhase):
                    logger.info("%-16s %6.2f s  %s", message.name, message.seconds, message.detail)
                elif isinstance(message, StartupFailed):
                    raise StartupError(message.message)
                elif isinstance(message, Ready):
                    self._take_ready(message)
                    return message
        finally:
            died.cancel()

    def _take_ready(self, info: Ready) -> None:
        self.info = info
        self._last_message = time.monotonic()
        self.ready = True
        self._metrics.engine_started(info, self._config.max_batch_size)

    async def _supervise(self, outbox: zmq.asyncio.Socket) -> None:
        """Receive until the process dies, then start it again, with growing pauses while that fails."""
        failures = 0
        while failures < MAX_FAILED_RESTARTS:
            if self.ready:
                try:
                    await self._receive_until_death(outbox)
                    logger.error("the engine process died; restarting it")
                except Exception:
                    logger.exception("the engine's messages cannot be handled; restarting it")
                self.ready = False
                self._fail_all("the engine restarted while this request ran; send it again")
            await self._end_process()
            outbox.close()
            await asyncio.sleep(0.0 if failures == 0 else 2.0 ** (failures - 1))
            try:
                outbox = await self._spawn()
                await self._await_ready(outbox)
            except (StartupError, OSError) as error:
                failures += 1
                logger.error("the engine cannot start (attempt %d): %s", failures, error)
                continue
            failures = 0
            self.restarts += 1
            self._metrics.engine_restarts.inc()
        logger.error("the engine did not start %d times in a row; giving up", failures)
        self.gave_up = True
        self.on_give_up()

    async def _receive_until_death(self, outbox: zmq.asyncio.Socket) -> None:
        assert self._process is not None
        died = asyncio.create_task(self._process.wait())
        receiving = asyncio.create_task(self._receive(outbox))
        try:
            await asyncio.wait({died, receiving}, return_when=asyncio.FIRST_COMPLETED)
            if receiving.done():
                receiving.result()
        finally:
            died.cancel()
            receiving.cancel()

    async def _end_process(self) -> None:
        process, self._process = self._process, None
        if self._inbox is not None:
            self._inbox.close()
            self._inbox = None
        if process is not None and process.returncode is None:
            if process.stdin is not None:
                process.stdin.close()
            try:
                await asyncio.wait_for(process.wait(), 5)
            except TimeoutError:
                process.kill()
                await process.wait()

    # --- requests -------------------------------------------------------------------------------------------

    @property
    def num_waiting(self) -> int:
        return sum(1 for request in list(self.active.values()) if request.state == "waiting")

    @property
    def num_running(self) -> int:
        return len(self.active) - self.num_waiting

    def reserve(self, count: int = 1) -> None:
        """Hold `count` places until `submit` or `unreserve`. Raises QueueFull, EngineAway or
        TooManySequences."""
        if self.draining or not self.ready:
            self._metrics.requests_rejected.labels("draining" if self.draining else "engine_away").inc(count)
            reason = "the server is shutting down" if self.draining else "the engine is restarting"
            raise EngineAway(f"{reason}; try again in a moment", retry_after=2)
        capacity = self._config.max_batch_size + self._config.max_queue_size
        if count > capacity:
            raise TooManySequences(f"this asks for {count} sequences at once; the server takes {capacity} at the most")
        if len(self.active) + self._reserved + count > capacity:
            self._metrics.requests_rejected.labels("queue_full").inc(count)
            wait = math.ceil(self._seconds_per_request * max(1, self.num_waiting))
            raise QueueFull(
                f"the waiting queue is full ({self._config.max_queue_size} requests); try again later",
                retry_after=min(max(wait, 1), 60),
            )
        self._reserved += count

    def unreserve(self, count: int = 1) -> None:
        self._reserved -= count

    def submit(self, request: ActiveRequest) -> None:
        """Send a request whose place was reserved to the engine."""
        self._reserved -= 1
        if not self.ready:
            request.error = EngineAway("the engine is restarting; try again in a moment")
            request.changed.set()
            return
        self.active[request.request_id] = request
        self._send(request.add)

    def cancel(self, request: ActiveRequest, reason: str) -> None:
        """Take a request out if it is still active; it leaves the batch before the next step."""
        if self.active.pop(request.request_id, None) is not None:
            self._count_end(request, reason, time.monotonic())
            if self.ready:
                self._send(CancelRequest([request.request_id]))

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
        if self.ready:
            self._send(ForgetSoftPrompt(sha256))

    def _send(self, message: EngineInput) -> None:
        """ZeroMQ queues without bound and never blocks here: the queue bound is kept by `reserve`."""
        assert self._inbox is not None
        self._inbox.send(self._encoder.encode(message), flags=zmq.NOBLOCK)

    async def _receive(self, outbox: zmq.asyncio.Socket) -> None:
        while True:
            message = self._decoder.decode(await outbox.recv())
            if isinstance(message, StepOutput):
                self._take_step(message)

    def _take_step(self, output: StepOutput) -> None:
        now = time.monotonic()
        self._last_message = now
        self.stats = output.stats
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
        request.num_cached = output.num_cached
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
        if reason not in ("cancelled", "error"):
            self._metrics.whole_request.observe(now - request.arrived)
        # The pace of a busy server: idle time before the request came does not count.
        seconds = min(now - self._last_finish, now - request.arrived)
        self._seconds_per_request += 0.1 * (seconds - self._seconds_per_request)
        self._last_finish = now

    def _fail_all(self, message: str) -> None:
        """Answer every active request with 503. The seam for resuming: `add` and `received` would be submitted again
        here instead, with `num_delivered` set."""
        for request in list(self.active.values()):
            request.error = EngineRestarted(message, retry_after=2)
            request.changed.set()
            self._count_end(request, "error", time.monotonic())
        self.active.clear()
