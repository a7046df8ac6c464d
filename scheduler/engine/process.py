"""The engine process: requests in and step outputs out over ZeroMQ, a heartbeat, and `main`."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from queue import Empty, SimpleQueue

import msgspec
import zmq

from softbatch.scheduler.engine.engine import Engine, build_engine
from softbatch.scheduler.engine.logs import configure_logging
from softbatch.scheduler.lasting_imports import importing_for_good
from softbatch.scheduler.protocol import (
    AddRequest,
    Admitting,
    CancelRequest,
    EngineConfig,
    EngineInput,
    EngineOutput,
    Heartbeat,
    StartupFailed,
    StartupPhase,
    StepOutput,
)

logger = logging.getLogger(__name__)
HEARTBEAT_SECONDS = 1.0
_PR_SET_PDEATHSIG = 1  # of Linux's sys/prctl.h


class EngineProcess:
    """The engine behind ZeroMQ: one message in per request, one message out per step."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        context = zmq.Context()
        self._inbox = context.socket(zmq.PULL)
        self._inbox.set_hwm(0)
        self._inbox.connect(config.inbox)
        self._outbox = context.socket(zmq.PUSH)
        self._outbox.set_hwm(0)
        self._outbox.setsockopt(zmq.LINGER, 1000)
        self._outbox.connect(config.outbox)
        self._encoder = msgspec.msgpack.Encoder()
        self._step_since: float | None = None
        self._messages: SimpleQueue[EngineInput | None] = SimpleQueue()  # None: a soft prompt has been read

    def run(self) -> int:
        """Serve until the front end goes away. Returns the exit status."""
        threading.Thread(target=self._beat, daemon=True, name="heartbeat").start()
        with importing_for_good("torch"):
            import softbatch.scheduler.model.loader  # noqa: F401  # build_engine calls it
            from softbatch.scheduler.model.earlier_start import EarlierStarts
            from softbatch.scheduler.model.source import ModelError, cache_directory
        starts: EarlierStarts | None = None
        try:
            with suppress(RuntimeError):  # whoever has no home directory keeps nothing
                starts = EarlierStarts(cache_directory() / "starts")
            engine, ready = build_engine(self._config, self._report, starts=starts)
        except ModelError as error:
            self._send(StartupFailed(str(error)))
            self._outbox.close()
            return 1
        engine.loader.on_read = lambda: self._messages.put(None)
        engine.on_admit = lambda request_ids: self._send(Admitting(request_ids))
        threading.Thread(target=self._receive, args=(engine,), daemon=True, name="inbox").start()
        self._send(ready)
        while True:
            self._step(engine)

    def _step(self, engine: Engine) -> None:
        output = None
        if engine.has_work:
            self._step_since = time.monotonic()
            output = engine.step()
            self._step_since = None
            if output.has_news:
                self._send(output)
            if output.has_news or engine.is_running:
                self._handle(engine, timeout=0)
                return
        # Nothing to compute: sleep until a request comes or a soft prompt has been read, and report statistics.
        self._handle(engine, timeout=HEARTBEAT_SECONDS)
        self._send(StepOutput(outputs=[], stats=engine.stats, resident=engine.resident_if_changed()))

    def _handle(self, engine: Engine, timeout: float) -> None:
        """Handle all messages that are there, waiting up to `timeout` seconds for the first."""
        with suppress(Empty):
            message = self._messages.get(timeout=timeout) if timeout else self._messages.get_nowait()
            while True:
                if message is not None:
                    engine.handle(message)
                message = self._messages.get_nowait()

    def _receive(self, engine: Engine) -> None:
        """Receive messages in a thread of its own, so that soft prompts are prefetched while a step runs."""
        decoder = msgspec.msgpack.Decoder(EngineInput)
        compiling = ThreadPoolExecutor(1, "grammars")
        try:
            while True:
                try:
                    message = decoder.decode(self._inbox.recv())
                except msgspec.MsgspecError:
                    logger.exception("a message from the front end could not be read")
                    continue
                if isinstance(message, AddRequest) and message.params.grammar:
                    # Behind it nobody waits for a grammar to be compiled.
                    compiling.submit(self._hand_on, engine, message)
                    continue
                self._hand_on(engine, message)
                if isinstance(message, CancelRequest):  # it may be about a request that is still to be handed on
                    compiling.submit(self._messages.put, message)
        except BaseException:
            logger.exception("the engine receives no more messages")
            os._exit(1)  # the front end starts another

    def _hand_on(self, engine: Engine, message: EngineInput) -> None:
        try:
            engine.prefetch(message)
        except Exception:  # whatever it was, it is met again when the request is handled, which must not be lost here
            logger.exception("a request could not be prepared")
        self._messages.put(message)

    def _beat(self) -> None:
        """Shows that the process lives, while it loads and in the middle of a step; sockets belong to one thread."""
        outbox = zmq.Context().socket(zmq.PUSH)
        outbox.setsockopt(zmq.LINGER, 0)
        outbox.connect(self._config.outbox)
        encoder = msgspec.msgpack.Encoder()
        while True:
            since = self._step_since
            outbox.send(encoder.encode(Heartbeat(time.monotonic() - since if since is not None else 0.0)))
            time.sleep(HEARTBEAT_SECONDS)

    def _send(self, message: EngineOutput) -> None:
        self._outbox.send(self._encoder.encode(message))

    def _report(self, name: str, seconds: float, detail: str) -> None:
        self._send(StartupPhase(name, seconds, detail))


def _exit_with_front_end() -> None:
    """The front end holds the other end of our standard input: when it is gone, so are we."""
    # Where the kernel can see to it, it also ends a process that hangs or is stopped.
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    def watch() -> None:
        # Not through sys.stdin, whose lock a thread must not hold while the interpreter ends.
        while os.read(0, 4096):
            pass
        os._exit(0)

    threading.Thread(target=watch, daemon=True, name="lifeline").start()


def main() -> int:
    """Run `python -m softbatch.scheduler.engine.process CONFIG`, an EngineConfig as JSON; stdin is the lifeline."""
    configure_logging("engine")
    # Ctrl-C and service managers signal the whole group: the front end decides, and it still has requests to finish.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _exit_with_front_end()
    return EngineProcess(msgspec.json.decode(sys.argv[1], type=EngineConfig)).run()


if __name__ == "__main__":
    sys.exit(main())
