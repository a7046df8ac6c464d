"""The engine: inbox → schedule → launch → postprocess → outbox. The only joiner of scheduler and model."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Protocol

import msgspec
import zmq

from softbatch.scheduler.engine.soft_prompt_loader import Reading, SoftPromptReader
from softbatch.scheduler.protocol import (
    AddRequest,
    CancelRequest,
    EngineConfig,
    EngineInput,
    EngineOutput,
    EngineStats,
    Ready,
    SequenceOutput,
    SoftPromptRef,
    StartupFailed,
    StartupPhase,
    StepOutput,
)
from softbatch.scheduler.scheduler import Scheduler, SchedulerConfig
from softbatch.scheduler.soft_prompt_cache import Residency, ResidentSoftPrompt
from softbatch.scheduler.step import DeviceLost, OutOfDeviceMemory, Step, StepResult

if TYPE_CHECKING:
    from softbatch.scheduler.model.runner import StagedSoftPrompt

logger = logging.getLogger(__name__)
HEARTBEAT_SECONDS = 1.0
_TOO_SMALL = "the device's memory is too small for this"


class Launched(Protocol):
    """A step that is on its way."""

    def result(self) -> StepResult:
        """Waits for its end. Called once."""
        ...


class ModelRunner(Protocol):
    """What the engine asks of the model side."""

    def launch(self, step: Step) -> Launched:
        """Raises OutOfDeviceMemory."""
        ...

    def prepare_to_read(self) -> None:
        """Called in the thread that reads soft prompts."""
        ...

    def read_soft_prompt(self, ref: SoftPromptRef) -> StagedSoftPrompt: ...

    def place_soft_prompt(self, resident: ResidentSoftPrompt, staged: StagedSoftPrompt) -> bool:
        """Raises OutOfDeviceMemory."""
        ...


@dataclass(frozen=True, eq=False)
class _NothingRuns:
    """What comes of a step for which there is no memory, however small it is made."""

    step: Step

    def result(self) -> StepResult:
        errors = {row.sequence.request_id: _TOO_SMALL for row in self.step.rows}
        return StepResult({}, {}, {}, errors, {fill.prompt.ref.sha256: _TOO_SMALL for fill in self.step.fills})


@dataclass(eq=False)
class _OnItsWay:
    step: Step
    launched: Launched
    since: float
    _result: StepResult | None = None

    def result(self) -> StepResult:
        if self._result is None:
            self._result = self.launched.result()
        return self._result


class Engine:
    """Owns the scheduler, the runner and the reader of soft prompts; one `step()` is one iteration.

    With `run_ahead`, an iteration launches the next step and then takes in the one before, which has run meanwhile;
    without, the very step that it launches. Not thread-safe, except `expect`.
    """

    def __init__(
        self, scheduler: Scheduler, runner: ModelRunner, bytes_per_block: int, *, run_ahead: bool = False
    ) -> None:
        self.scheduler = scheduler
        self._runner = runner
        self._bytes_per_block = bytes_per_block
        self._run_ahead = run_ahead
        self._on_its_way: _OnItsWay | None = None
        self._last_end = 0.0
        self.reader: SoftPromptReader[StagedSoftPrompt] = SoftPromptReader(
            runner.read_soft_prompt, runner.prepare_to_read
        )
        self._requested: dict[str, float] = {}
        self._refused: list[SequenceOutput] = []

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or self.is_running or bool(self._refused) or len(self.reader) > 0

    @property
    def is_running(self) -> bool:
        """Whether a step is on its way."""
        return self._on_its_way is not None

    @property
    def stats(self) -> EngineStats:
        return self.scheduler.stats(self._bytes_per_block)

    def expect(self, message: EngineInput) -> None:
        """Begin to read the soft prompt of a request that is about to be handled, where nothing keeps it from being
        admitted at the next step: it need not wait for one more. Any thread may call this."""
        ref = message.soft_prompt if isinstance(message, AddRequest) else None
        if ref is not None and self.scheduler.would_load(ref, len(self.reader)):
            self.reader.start(ref)

    def handle(self, message: EngineInput) -> None:
        if isinstance(message, AddRequest):
            refusal = self.scheduler.add(message)
            if refusal is not None:
                self._refused.append(refusal)
        elif isinstance(message, CancelRequest):
            for request_id in message.request_ids:
                self.scheduler.cancel(request_id)
        else:
            self.scheduler.soft_prompts.forget(message.sha256)

    def step(self) -> StepOutput:
        """One iteration. Without anything to compute its output says what changed otherwise, if anything did."""
        started = time.perf_counter()
        outputs, self._refused = self._refused, []
        step = self.scheduler.schedule()
        scheduled = time.perf_counter()
        self._start_reading(step)
        loaded = []
        if readings := self.reader.collect():
            loaded = self._place(readings, outputs)
            self.scheduler.join(step)
            self._start_reading(step)
        ended = [self._on_its_way] if self._on_its_way else []
        self._on_its_way = self._launch(step, started) if step else None
        if self._on_its_way and (not self._run_ahead or isinstance(self._on_its_way.launched, _NothingRuns)):
            ended.append(self._on_its_way)
            self._on_its_way = None
        for one in ended:
            result = one.result()
            outputs += self.scheduler.postprocess(one.step, result)
            loaded += self._collect_filled(one.step, result)
        last_end, now = self._last_end, time.perf_counter()
        if ended:
            self._last_end = now
        return StepOutput(
            outputs=outputs,
            stats=self.stats,
            admitted=step.admitted,
            preempted=step.preempted,
            batch_size=sum(len(one.step.rows) for one in ended),
            num_tokens=sum(one.step.num_tokens for one in ended),
            step_seconds=now - max(ended[0].since, last_end) if ended else 0.0,
            schedule_seconds=scheduled - started,
            soft_prompt_load_seconds=loaded,
        )

    def _launch(self, step: Step, since: float) -> _OnItsWay:
        """Launch the step, made smaller as often as the device runs out of memory; before that, the step on its way is
        waited for, which gives back what it holds."""
        launched: Launched | None = None
        before = self._on_its_way
        while launched is None:
            whole = Step(rows=step.rows, fills=step.fills)
            try:
                launched = self._runner.launch(step)
            except OutOfDeviceMemory:
                if before is not None:
                    before.result()
                    before = None
                    continue
                logger.warning("out of device memory in a step of %d tokens; running it again smaller", step.num_tokens)
                if not self.scheduler.shrink(step):
                    step.rows, step.fills = whole.rows, whole.fills
                    launched = _NothingRuns(whole)
        self.scheduler.launched(step)
        return _OnItsWay(step, launched, since)

    def close(self) -> None:
        self.reader.close()

    def _start_reading(self, step: Step) -> None:
        while step.reads:
            self.reader.start(step.reads.pop(0))

    def _place(self, readings: list[Reading[StagedSoftPrompt]], outputs: list[SequenceOutput]) -> list[float]:
        """Place the soft prompts whose files have been read; returns the seconds each took that lies ready now.

        What was read ahead of a request that did not come, or could not be scheduled, is dropped."""
        ready = []
        for reading in readings:
            sha256 = reading.ref.sha256
            resident = self.scheduler.soft_prompts.get(sha256)
            if resident is None or resident.state is not Residency.READING:
                continue
            try:
                if self._runner.place_soft_prompt(resident, reading.result.result()):
                    self.scheduler.soft_prompt_ready(sha256)
                    ready.append(time.monotonic() - reading.since)
                else:
                    self.scheduler.soft_prompt_read(sha256)
                    self._requested[sha256] = reading.since
            except OutOfDeviceMemory:
                if self.scheduler.running:  # once somebody has left there may be room
                    self.scheduler.hold_back()
                    self.reader.put_back(reading)
                    continue
                outputs += self.scheduler.soft_prompt_failed(sha256, f"soft prompt: {_TOO_SMALL}")
            except DeviceLost:
                raise
            except Exception as error:
                logger.exception("soft prompt %s cannot be loaded", sha256)
                reason = str(error) if isinstance(error, ValueError) else "it cannot be read"
                outputs += self.scheduler.soft_prompt_failed(sha256, f"soft prompt: {reason}")
        return ready

    def _collect_filled(self, step: Step, result: StepResult) -> list[float]:
        last = [fill.prompt.ref.sha256 for fill in step.fills if fill.is_last]
        filled = [sha256 for sha256 in last if sha256 not in result.fill_errors]
        return [time.monotonic() - self._requested.pop(sha256) for sha256 in filled if sha256 in self._requested]


def build_engine(config: EngineConfig, report: Reporter) -> tuple[Engine, Ready]:
    """Load the model and put an engine around it. Raises ModelError."""
    from softbatch.scheduler.model.loader import load

    loaded = load(config, report)
    kv = loaded.kv_cache
    scheduler = Scheduler(
        SchedulerConfig(
            max_batch_size=config.max_batch_size,
            max_batch_tokens=config.max_batch_tokens,
            max_model_len=loaded.info.max_model_len,
            max_queue_size=config.max_queue_size + config.max_batch_size,
            num_blocks=kv.num_blocks,
            block_size=kv.block_size,
            eos_token_ids=frozenset(loaded.info.eos_token_ids),
        )
    )
    ready = Ready(
        model=loaded.info,
        num_blocks=kv.num_blocks,
        block_size=kv.block_size,
        kv_bytes=kv.num_blocks * kv.bytes_per_block,
    )
    run_ahead = config.async_scheduling == "on" or (config.async_scheduling == "auto" and loaded.info.is_on_gpu)
    return Engine(scheduler, loaded.runner, kv.bytes_per_block, run_ahead=run_ahead), ready


class Reporter(Protocol):
    def __call__(self, name: str, seconds: float, detail: str) -> None: ...


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
        self._messages: SimpleQueue[EngineInput | None] = SimpleQueue()  # None: a soft prompt has been read

    def run(self) -> int:
        """Serve until the front end goes away. Returns the exit status."""
        from softbatch.scheduler.model.source import ModelError

        try:
            engine, ready = build_engine(self._config, self._report)
        except ModelError as error:
            self._send(StartupFailed(str(error)))
            self._outbox.close()
            return 1
        engine.reader.on_read = lambda: self._messages.put(None)
        threading.Thread(target=self._receive, args=(engine,), daemon=True, name="inbox").start()
        self._send(ready)
        while True:
            self._step(engine)

    def _step(self, engine: Engine) -> None:
        output = None
        if engine.has_work:
            output = engine.step()
            if output.has_news:
                self._send(output)
            if output.has_news or engine.is_running:
                self._handle(engine, timeout=0)
                return
        # Nothing to compute: sleep until a request comes or a soft prompt has been read, and show a sign of life.
        self._handle(engine, timeout=HEARTBEAT_SECONDS)
        self._send(StepOutput(outputs=[], stats=engine.stats))

    def _handle(self, engine: Engine, timeout: float) -> None:
        """Handle all messages that are there, waiting up to `timeout` seconds for the first."""
        with suppress(Empty):
            message = self._messages.get(timeout=timeout) if timeout else self._messages.get_nowait()
            while True:
                if message is not None:
                    engine.handle(message)
                message = self._messages.get_nowait()

    def _receive(self, engine: Engine) -> None:
        """Takes messages in as they come, in a thread of its own: a step need not end before files are read."""
        decoder = msgspec.msgpack.Decoder(EngineInput)
        try:
            while True:
                try:
                    message = decoder.decode(self._inbox.recv())
                except msgspec.MsgspecError:
                    logger.exception("a message from the front end could not be read")
                    continue
                engine.expect(message)
                self._messages.put(message)
        except BaseException:
            logger.exception("the engine receives no more messages")
            os._exit(1)  # the front end starts another

    def _send(self, message: EngineOutput) -> None:
        self._outbox.send(self._encoder.encode(message))

    def _report(self, name: str, seconds: float, detail: str) -> None:
        self._send(StartupPhase(name, seconds, detail))


def _exit_with_front_end() -> None:
    """The front end holds the other end of our standard input: when it is gone, so are we."""

    def watch() -> None:
        # Not through sys.stdin, whose lock a thread must not hold while the interpreter ends.
        while os.read(0, 4096):
            pass
        os._exit(0)

    threading.Thread(target=watch, daemon=True, name="lifeline").start()


def main() -> int:
    """`python -m softbatch.scheduler.engine.engine CONFIG`, an EngineConfig as JSON; standard input is the lifeline."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s engine: %(message)s")
    # Ctrl-C and service managers signal the whole group: the front end decides, and it still has requests to finish.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _exit_with_front_end()
    return EngineProcess(msgspec.json.decode(sys.argv[1], type=EngineConfig)).run()


if __name__ == "__main__":
    sys.exit(main())
