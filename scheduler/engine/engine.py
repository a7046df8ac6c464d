"""The engine: inbox → schedule → launch → postprocess → outbox. The only joiner of scheduler and model."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from softbatch.scheduler.engine.soft_prompt_loader import Reading, SoftPromptReader
from softbatch.scheduler.protocol import (
    AddRequest,
    CancelRequest,
    EngineConfig,
    EngineInput,
    EngineStats,
    Ready,
    SequenceOutput,
    SoftPromptRef,
    StepOutput,
)
from softbatch.scheduler.scheduler import Scheduler, SchedulerConfig
from softbatch.scheduler.soft_prompt_cache import LoadState, ResidentSoftPrompt
from softbatch.scheduler.step import DeviceLost, OutOfDeviceMemory, Step, StepResult

if TYPE_CHECKING:
    from softbatch.scheduler.model.runner import StagedSoftPrompt

logger = logging.getLogger(__name__)
_TOO_SMALL = "the device's memory is too small for this"


class SubmittedStep(Protocol):
    """A step that has been launched."""

    def result(self) -> StepResult:
        """Waits for its end. Called once."""
        ...


class ModelRunner(Protocol):
    """What the engine asks of the model side."""

    def launch(self, step: Step) -> SubmittedStep:
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
class _FailedStep:
    """What comes of a step for which there is no memory, however small it is made."""

    step: Step

    def result(self) -> StepResult:
        errors = {row.sequence.request_id: _TOO_SMALL for row in self.step.rows}
        return StepResult({}, {}, {}, errors, {prefill.prompt.ref.sha256: _TOO_SMALL for prefill in self.step.prefills})


@dataclass(eq=False)
class _InFlight:
    step: Step
    launched: SubmittedStep
    since: float
    _result: StepResult | None = None

    def result(self) -> StepResult:
        if self._result is None:
            self._result = self.launched.result()
        return self._result


class Engine:
    """Owns the scheduler, the runner and the reader of soft prompts; one `step()` is one iteration.

    With `async_scheduling`, an iteration launches step N+1 and then processes the result of step N. Without it, an
    iteration processes the step that it launched. Not thread-safe, except `prefetch`.
    """

    def __init__(
        self, scheduler: Scheduler, runner: ModelRunner, bytes_per_block: int, *, async_scheduling: bool = False
    ) -> None:
        self.scheduler = scheduler
        self._runner = runner
        self._bytes_per_block = bytes_per_block
        self._async_scheduling = async_scheduling
        self._in_flight: _InFlight | None = None
        self._last_end = 0.0
        self.reader: SoftPromptReader[StagedSoftPrompt] = SoftPromptReader(
            runner.read_soft_prompt, runner.prepare_to_read
        )
        self._requested: dict[str, float] = {}
        self.on_admit: Callable[[list[str]], None] = lambda request_ids: None
        self._refused: list[SequenceOutput] = []

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or self.is_running or bool(self._refused) or len(self.reader) > 0

    @property
    def is_running(self) -> bool:
        """Whether a step is in flight."""
        return self._in_flight is not None

    @property
    def stats(self) -> EngineStats:
        return self.scheduler.stats(self._bytes_per_block)

    def prefetch(self, message: EngineInput) -> None:
        """Begin to read the soft prompt of a request that is about to be handled, where nothing keeps it from being
        admitted at the next step: it need not wait for one more. Any thread may call this."""
        ref = message.soft_prompt if isinstance(message, AddRequest) else None
        if ref is not None and self.scheduler.should_prefetch(ref, len(self.reader)):
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
            self.scheduler.soft_prompts.evict_when_unused(message.sha256)

    def step(self) -> StepOutput:
        """One iteration. Without anything to compute its output says what changed otherwise, if anything did."""
        started = time.perf_counter()
        outputs, self._refused = self._refused, []
        step = self.scheduler.schedule()
        scheduled = time.perf_counter()
        self._start_reading(step)
        loaded = []
        if readings := self.reader.take_read():
            loaded = self._place(readings, outputs)
            self.scheduler.admit_late(step)
            self._start_reading(step)
        if step.admitted:
            self.on_admit(step.admitted)
        ended = [self._in_flight] if self._in_flight else []
        self._in_flight = self._launch(step, started) if step else None
        if self._in_flight and (not self._async_scheduling or isinstance(self._in_flight.launched, _FailedStep)):
            ended.append(self._in_flight)
            self._in_flight = None
        for one in ended:
            result = one.result()
            outputs += self.scheduler.postprocess(one.step, result)
            loaded += self._load_seconds_of_prefilled(one.step, result)
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

    def _launch(self, step: Step, since: float) -> _InFlight:
        """Launch the step. If the device runs out of memory, wait for the step in flight, which frees what it holds; if
        that is not enough, make the step smaller until it fits."""
        launched: SubmittedStep | None = None
        before = self._in_flight
        while launched is None:
            whole = Step(rows=step.rows, prefills=step.prefills)
            try:
                launched = self._runner.launch(step)
            except OutOfDeviceMemory:
                if before is not None:
                    before.result()
                    before = None
                    continue
                logger.warning("out of device memory in a step of %d tokens; running it again smaller", step.num_tokens)
                if not self.scheduler.shrink(step):
                    step.rows, step.prefills = whole.rows, whole.prefills
                    launched = _FailedStep(whole)
        self.scheduler.mark_in_flight(step)
        return _InFlight(step, launched, since)

    def close(self) -> None:
        self.reader.close()

    def _start_reading(self, step: Step) -> None:
        while step.soft_prompts_to_load:
            self.reader.start(step.soft_prompts_to_load.pop(0))

    def _place(self, readings: list[Reading[StagedSoftPrompt]], outputs: list[SequenceOutput]) -> list[float]:
        """Place the soft prompts whose files have been read; returns the seconds each took that lies ready now.

        What was read ahead of a request that did not come, or could not be scheduled, is dropped."""
        ready = []
        for reading in readings:
            sha256 = reading.ref.sha256
            resident = self.scheduler.soft_prompts.get(sha256)
            if resident is None or resident.state is not LoadState.READING:
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
                    self.scheduler.pause_admission()
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

    def _load_seconds_of_prefilled(self, step: Step, result: StepResult) -> list[float]:
        last = [prefill.prompt.ref.sha256 for prefill in step.prefills if prefill.is_last]
        filled = [sha256 for sha256 in last if sha256 not in result.prefill_errors]
        return [time.monotonic() - self._requested.pop(sha256) for sha256 in filled if sha256 in self._requested]


class Reporter(Protocol):
    def __call__(self, name: str, seconds: float, detail: str) -> None: ...


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
    async_scheduling = config.async_scheduling == "on" or (config.async_scheduling == "auto" and loaded.info.is_on_gpu)
    return Engine(scheduler, loaded.runner, kv.bytes_per_block, async_scheduling=async_scheduling), ready
