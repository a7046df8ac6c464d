"""The life of the engine process: started, watched, started again when it dies, ended."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import time
from collections import deque
from collections.abc import Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import msgspec
import zmq
import zmq.asyncio

import softbatch
from softbatch.scheduler.protocol import (
    Admitting,
    EngineConfig,
    EngineInput,
    EngineOutput,
    Heartbeat,
    Ready,
    StartupFailed,
    StartupPhase,
    StepOutput,
)
from softbatch.server.requests.watchdog import TICK_SECONDS, Watchdog, seconds_of_full_step

logger = logging.getLogger(__name__)
T = TypeVar("T")
PROJECT = Path(softbatch.__file__).resolve().parents[1]  # where `-m softbatch…` finds the code
MAX_FAILED_STARTS = 5
# An engine whose standard input is closed ends by itself, unless it hangs.
END_SECONDS = 2.0
# What an engine said right before its death is still on its way when the process is gone.
LAST_WORDS_SECONDS = 0.05


class StartupError(Exception):
    """The engine cannot start; the message is one line that says what to change."""


class ModelChanged(StartupError):
    """Another engine would serve another model than the one before; no further attempt helps."""


@dataclass(frozen=True)
class Patience:
    """How much an engine may ask of its supervisor. `max_step` None: what a slow machine needs for a full step."""

    max_step: float | None = None
    max_deaths: int = 10
    death_window: float = 600.0


class EngineListener(Protocol):
    """Who is told of the engine's life and of its steps."""

    def engine_started(self, info: Ready) -> None: ...

    def engine_admitting(self, sequence_ids: list[str]) -> None: ...

    def engine_stepped(self, output: StepOutput) -> None: ...

    def engine_died(self) -> None: ...

    def engine_given_up(self, reason: str) -> None: ...


class EngineSupervisor:
    """Owns the engine process and its sockets in `directory`.

    An engine that dies, or hangs and is killed for it, gets a successor, until `patience` is at an end.
    """

    def __init__(self, config: EngineConfig, directory: Path, patience: Patience) -> None:
        self.config = config
        self._patience = patience
        self._deaths: deque[float] = deque()
        self._watchdog = Watchdog()
        self._directory = directory
        self._context = zmq.asyncio.Context()
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(EngineOutput)
        self._process: asyncio.subprocess.Process | None = None
        self._inbox: zmq.asyncio.Socket | None = None
        self._supervising: asyncio.Task[None] | None = None
        self._generation = 0
        self.info: Ready | None = None
        self.ready = False
        self.gave_up = False

    async def start(self, listener: EngineListener) -> Ready:
        """Start the engine and wait until it takes requests. Raises StartupError."""
        outbox = await self._spawn()
        info = await self._await_ready(outbox, listener)
        self._supervising = asyncio.create_task(self._supervise(outbox, listener))
        return info

    async def stop(self) -> None:
        """End the engine process, and whatever is being done about its death."""
        if self._supervising is not None:
            self._supervising.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._supervising
        self.ready = False
        await self._end_process()
        self._context.destroy(linger=0)

    def send(self, message: EngineInput) -> None:
        """To an engine that is ready. ZeroMQ queues without bound and never blocks here: whoever admits requests keeps
        their number bounded."""
        assert self._inbox is not None
        sent = self._inbox.send(self._encoder.encode(message), flags=zmq.NOBLOCK)
        asyncio.ensure_future(sent).add_done_callback(_look_at)

    @property
    def pid(self) -> int:
        """Of the engine process, 0 while there is none."""
        return self._process.pid if self._process is not None else 0

    @property
    def complaint(self) -> str | None:
        """Why an engine that is there counts as hung; it is about to be killed."""
        return self._watchdog.complaint

    async def _spawn(self) -> zmq.asyncio.Socket:
        """A fresh process with fresh sockets, so that nothing of an earlier engine's is mistaken for its own."""
        self._generation += 1
        self._watchdog = Watchdog()
        inbox, outbox = self._context.socket(zmq.PUSH), self._context.socket(zmq.PULL)
        names = {}
        for name, socket in (("inbox", inbox), ("outbox", outbox)):
            socket.set_hwm(0)
            socket.setsockopt(zmq.LINGER, 0)
            names[name] = f"ipc://{self._directory}/{name}-{self._generation}"
            socket.bind(names[name])
        config = msgspec.structs.replace(self.config, **names, started_at=time.monotonic())
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

    async def _await_ready(self, outbox: zmq.asyncio.Socket, listener: EngineListener) -> Ready:
        info = await self._while_alive(self._receive_ready(outbox))
        if info is None:
            status = self._process.returncode if self._process else None
            raise StartupError(self.complaint or f"the engine process ended with status {status} while starting")
        model = info.model
        if self.info is not None and model.fingerprint != self.info.model.fingerprint:
            raise ModelChanged(
                "the model's files have changed since the server began, and what was accepted cannot go on with "
                "others; start the server again"
            )
        slow = seconds_of_full_step(self.config, model.num_parameters, is_on_gpu=model.is_on_gpu)
        self._watchdog.expect_steps(self._patience.max_step or slow)
        self.info = info
        self.ready = True
        listener.engine_started(info)
        return info

    async def _receive_ready(self, outbox: zmq.asyncio.Socket) -> Ready:
        while True:
            message = self._decoder.decode(await outbox.recv())
            self._watchdog.heard()
            if isinstance(message, StartupPhase):
                logger.info("%-16s %6.2f s  %s", message.name, message.seconds, message.detail)
            elif isinstance(message, StartupFailed):
                raise StartupError(message.message)
            elif isinstance(message, Ready):
                return message

    async def _supervise(self, outbox: zmq.asyncio.Socket, listener: EngineListener) -> None:
        try:
            reason = await self._keep_alive(outbox, listener)
        except Exception:
            logger.exception("the engine is not supervised any more")
            reason = "the engine could not be started again"
        logger.error("%s; giving up", reason)
        self.ready = False
        self.gave_up = True
        listener.engine_given_up(reason)

    async def _keep_alive(self, outbox: zmq.asyncio.Socket, listener: EngineListener) -> str:
        """Receive until the process dies, then start another, again and again. Returns why there is to be no other."""
        while True:
            try:
                await self._while_alive(self._receive_steps(outbox, listener))
                logger.error("%s; starting another", self.complaint or "the engine process died")
            except Exception:
                logger.exception("the engine's messages cannot be handled; starting another")
            self.ready = False
            listener.engine_died()
            await self._end_process(at_once=True)
            outbox.close()
            if reason := self._out_of_patience():
                return reason
            try:
                outbox = await self._start_again(listener)
            except StartupError as error:
                return str(error)

    def _out_of_patience(self) -> str | None:
        """Count a death; why there is to be no other engine, if it was one too many."""
        now = time.monotonic()
        self._deaths.append(now)
        while self._deaths[0] < now - self._patience.death_window:
            self._deaths.popleft()
        if len(self._deaths) < self._patience.max_deaths:
            return None
        return f"the engine died {len(self._deaths)} times within {self._patience.death_window:g} s"

    async def _start_again(self, listener: EngineListener) -> zmq.asyncio.Socket:
        """With growing pauses while that fails. Raises StartupError."""
        for failures in range(MAX_FAILED_STARTS):
            await asyncio.sleep(0.0 if failures == 0 else 2.0 ** (failures - 1))
            outbox: zmq.asyncio.Socket | None = None
            try:
                outbox = await self._spawn()
                await self._await_ready(outbox, listener)
                return outbox
            except ModelChanged:
                raise
            except (StartupError, OSError) as error:
                logger.error("the engine cannot start (attempt %d): %s", failures + 1, error)
                await self._end_process(at_once=True)
                if outbox is not None:
                    outbox.close()
        raise StartupError(f"the engine did not start {MAX_FAILED_STARTS} times in a row")

    async def _receive_steps(self, outbox: zmq.asyncio.Socket, listener: EngineListener) -> None:
        while True:
            message = self._decoder.decode(await outbox.recv())
            if isinstance(message, Heartbeat):
                self._watchdog.heard(message.step_seconds)
                continue
            self._watchdog.heard()
            if isinstance(message, StepOutput):
                listener.engine_stepped(message)
            elif isinstance(message, Admitting):
                listener.engine_admitting(message.request_ids)

    async def _while_alive(self, receiving: Coroutine[Any, Any, T]) -> T | None:
        """What `receiving` returns, or None when the process is dead before that. One that hangs is killed."""
        process = self._process
        assert process is not None
        task = asyncio.create_task(receiving)
        ending = {asyncio.create_task(process.wait()), asyncio.create_task(self._watch(self._watchdog))}
        try:
            await asyncio.wait({task, *ending}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                if process.returncode is None:
                    process.kill()
                await asyncio.wait({task}, timeout=LAST_WORDS_SECONDS)
            return task.result() if task.done() else None
        finally:
            for pending in (task, *ending):
                pending.cancel()
            await asyncio.gather(task, *ending, return_exceptions=True)

    async def _watch(self, watchdog: Watchdog) -> None:
        """Returns when the engine hangs."""
        last = time.monotonic()
        while watchdog.complaint is None:
            await asyncio.sleep(TICK_SECONDS)
            now = time.monotonic()
            watchdog.tick(now - last)
            last = now

    async def _end_process(self, *, at_once: bool = False) -> None:
        process, self._process = self._process, None
        if self._inbox is not None:
            self._inbox.close()
            self._inbox = None
        if process is not None and process.returncode is None:
            try:
                if process.stdin is not None and not at_once:
                    process.stdin.close()
                    await asyncio.wait_for(process.wait(), END_SECONDS)
            except TimeoutError:
                pass
            if process.returncode is None:
                process.kill()
                await process.wait()


def _look_at(sent: asyncio.Future[Any]) -> None:
    """An engine that dies may not take a message any more, which is no error: the next one gets what was accepted."""
    if not sent.cancelled():
        sent.exception()
