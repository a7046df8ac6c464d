"""The life of the engine process: started, watched, started again when it dies, ended."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import time
from pathlib import Path
from typing import Protocol

import msgspec
import zmq
import zmq.asyncio

import softbatch
from softbatch.scheduler.protocol import (
    EngineConfig,
    EngineInput,
    EngineOutput,
    Ready,
    StartupFailed,
    StartupPhase,
    StepOutput,
)

logger = logging.getLogger(__name__)
PROJECT = Path(softbatch.__file__).resolve().parents[1]  # where `-m softbatch…` finds the code
MAX_FAILED_RESTARTS = 5
# A step may take long on a slow machine; silence longer than this means that no step is being made.
SILENCE_SECONDS = 30.0


class StartupError(Exception):
    """The engine cannot start; the message is one line that says what to change."""


class EngineListener(Protocol):
    """Who is told of the engine's life and of its steps."""

    def engine_started(self, info: Ready) -> None: ...

    def engine_stepped(self, output: StepOutput) -> None: ...

    def engine_died(self) -> None: ...

    def engine_given_up(self) -> None: ...


class EngineSupervisor:
    """Owns the engine process and its sockets in `directory`."""

    def __init__(self, config: EngineConfig, directory: Path) -> None:
        self.config = config
        self._directory = directory
        self._context = zmq.asyncio.Context()
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(EngineOutput)
        self._process: asyncio.subprocess.Process | None = None
        self._inbox: zmq.asyncio.Socket | None = None
        self._supervising: asyncio.Task[None] | None = None
        self._generation = 0
        self._last_message = time.monotonic()
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
        """End the engine process."""
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
        self._inbox.send(self._encoder.encode(message), flags=zmq.NOBLOCK)

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
                    self.info = message
                    self._last_message = time.monotonic()
                    self.ready = True
                    listener.engine_started(message)
                    return message
        finally:
            died.cancel()

    async def _supervise(self, outbox: zmq.asyncio.Socket, listener: EngineListener) -> None:
        """Receive until the process dies, then start it again, with growing pauses while that fails."""
        failures = 0
        while failures < MAX_FAILED_RESTARTS:
            if self.ready:
                try:
                    await self._receive_until_death(outbox, listener)
                    logger.error("the engine process died; restarting it")
                except Exception:
                    logger.exception("the engine's messages cannot be handled; restarting it")
                self.ready = False
                listener.engine_died()
            await self._end_process()
            outbox.close()
            await asyncio.sleep(0.0 if failures == 0 else 2.0 ** (failures - 1))
            try:
                outbox = await self._spawn()
                await self._await_ready(outbox, listener)
            except (StartupError, OSError) as error:
                failures += 1
                logger.error("the engine cannot start (attempt %d): %s", failures, error)
                continue
            failures = 0
        logger.error("the engine did not start %d times in a row; giving up", failures)
        self.gave_up = True
        listener.engine_given_up()

    async def _receive_until_death(self, outbox: zmq.asyncio.Socket, listener: EngineListener) -> None:
        assert self._process is not None
        died = asyncio.create_task(self._process.wait())
        receiving = asyncio.create_task(self._receive(outbox, listener))
        try:
            await asyncio.wait({died, receiving}, return_when=asyncio.FIRST_COMPLETED)
            if receiving.done():
                receiving.result()
        finally:
            died.cancel()
            receiving.cancel()

    async def _receive(self, outbox: zmq.asyncio.Socket, listener: EngineListener) -> None:
        while True:
            message = self._decoder.decode(await outbox.recv())
            if isinstance(message, StepOutput):
                self._last_message = time.monotonic()
                listener.engine_stepped(message)

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
