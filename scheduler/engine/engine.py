"""The engine: inbox → schedule → launch → postprocess → outbox. The only joiner of scheduler and model."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from softbatch.scheduler.engine.moments import Moments
from softbatch.scheduler.engine.soft_prompt_loader import SoftPromptLoader, SoftPromptRunner
from softbatch.scheduler.protocol import (
    AddRequest,
    CancelRequest,
    EngineConfig,
    EngineInput,
    EngineStats,
    ModelInfo,
    Ready,
    SequenceOutput,
    SoftPromptRef,
    StepOutput,
)
from softbatch.scheduler.scheduler import Scheduler
from softbatch.scheduler.scheduler_config import SchedulerConfig
from softbatch.scheduler.step import TOO_LITTLE_MEMORY, OutOfDeviceMemory, Step, StepResult

if TYPE_CHECKING:
    from softbatch.scheduler.model.earlier_start import EarlierStarts
    from softbatch.scheduler.model.source import ModelSource

logger = logging.getLogger(__name__)
# At most so much memory holds a step's logits, in float32, that score prompts.
_SCORED_LOGITS_BYTES = 256 << 20
_CPU_STEP_SECONDS = 0.05


class SubmittedStep(Protocol):
    """A step that has been launched."""

    def result(self) -> StepResult:
        """Waits for its end. Called once."""
        ...


class ModelRunner(SoftPromptRunner, Protocol):
    """What the engine asks of the model side."""

    def launch(self, step: Step) -> SubmittedStep:
        """Raises OutOfDeviceMemory and DeviceLost."""
        ...

    def prepare_grammar(self, grammar: str) -> None:
        """Called in the thread that receives requests, so that no step waits for it."""
        ...


@dataclass(frozen=True, eq=False)
class _FailedStep:
    """What comes of a step for which there is no memory, however small it is made."""

    step: Step

    def result(self) -> StepResult:
        errors = {row.sequence.request_id: TOO_LITTLE_MEMORY for row in self.step.rows}
        return StepResult(
            {}, {}, {}, errors, {prefill.prompt.ref.sha256: TOO_LITTLE_MEMORY for prefill in self.step.prefills}
        )


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
    """Owns the scheduler, the runner and the loader of soft prompts; one `step()` is one iteration.

    With `async_scheduling`, an iteration launches step N+1 and then processes the result of step N. Without it, an
    iteration processes the step that it launched. Not thread-safe, except `prefetch`.
    """

    def __init__(
        self, scheduler: Scheduler, runner: ModelRunner, bytes_per_block: int, *, async_scheduling: bool = False
    ) -> None:
        self.scheduler = scheduler
        self.loader = SoftPromptLoader(scheduler, runner)
        self._runner = runner
        self._bytes_per_block = bytes_per_block
        self._async_scheduling = async_scheduling
        self._in_flight: _InFlight | None = None
        self._last_end = 0.0
        self._told_changes = 0
        self.on_admit: Callable[[list[str]], None] = lambda request_ids: None
        self._refused: list[SequenceOutput] = []
        self._moments = Moments()

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or self.is_running or bool(self._refused) or self.loader.num_reading > 0

    @property
    def is_running(self) -> bool:
        """Whether a step is in flight."""
        return self._in_flight is not None

    @property
    def stats(self) -> EngineStats:
        return self.scheduler.stats(self._bytes_per_block)

    def prefetch(self, message: EngineInput) -> None:
        """Begin with what a request that is about to be handled will need: compile its grammar, and read its soft
        prompt if the request could be admitted at the next step. Thread-safe."""
        if not isinstance(message, AddRequest):
            return
        if message.params.grammar:
            self._runner.prepare_grammar(message.params.grammar)
        if message.soft_prompt is not None:
            self.loader.prefetch(self._as_it_stands(message.soft_prompt, message))

    def _as_it_stands(self, soft_prompt: SoftPromptRef, message: AddRequest) -> SoftPromptRef:
        rule = self.scheduler.config.length_rule
        prompt = len(message.token_ids) - message.num_delivered
        return soft_prompt if rule is None else rule.soft_prompt_of(soft_prompt, prompt)

    def handle(self, message: EngineInput) -> None:
        if isinstance(message, AddRequest):
            self._moments.watch(message)
            refusal = self.scheduler.add(message)
            if refusal is not None:
                self._refused.append(refusal)
        elif isinstance(message, CancelRequest):
            for request_id in message.request_ids:
                self.scheduler.cancel(request_id)
                self._moments.forget(request_id)
        else:
            self.scheduler.soft_prompts.evict_when_unused(message.sha256)

    def step(self) -> StepOutput:
        """One iteration. If there is nothing to compute, the output still has other news, such as refusals."""
        started = time.perf_counter()
        step = self.scheduler.schedule()
        scheduled = time.perf_counter()
        report = step.report
        report.outputs, self._refused = self._refused, []
        self.loader.start(step)
        if self.loader.place_read(report):
            self.scheduler.admit_late(step)
            self.loader.start(step)
        self._moments.planned(report)
        if report.admitted:
            self.on_admit(report.admitted)
        ended = [self._in_flight] if self._in_flight else []
        self._in_flight = self._launch(step, started) if step else None
        if self._in_flight and (not self._async_scheduling or isinstance(self._in_flight.launched, _FailedStep)):
            ended.append(self._in_flight)
            self._in_flight = None
        for one in ended:
            report.outputs += self.scheduler.postprocess(one.step, one.result())
        self.loader.report_prefilled(report)
        last_end, now = self._last_end, time.perf_counter()
        step_seconds = now - max(ended[0].since, last_end) if ended else 0.0
        num_tokens = sum(one.step.num_tokens for one in ended)
        if ended:
            self._last_end = now
        for one in ended:
            self.scheduler.observe(one.step, step_seconds / len(ended))
        return StepOutput(
            outputs=report.outputs,
            stats=self.stats,
            admitted=report.admitted,
            preempted=report.preempted,
            batch_size=sum(len(one.step.rows) for one in ended),
            num_tokens=num_tokens,
            step_seconds=step_seconds,
            schedule_seconds=scheduled - started,
            soft_prompt_load_seconds=[load.until - load.since for load in report.soft_prompt_loads],
            resident=self.resident_if_changed(),
            moments=self._moments.of_step(report),
        )

    def resident_if_changed(self) -> list[str] | None:
        """The soft prompts in KV blocks, if these are others than when this was last asked."""
        cache = self.scheduler.soft_prompts
        if cache.changes == self._told_changes:
            return None
        self._told_changes = cache.changes
        return cache.ready()

    def _launch(self, step: Step, since: float) -> _InFlight:
        """Launch the step. If the device runs out of memory, wait for the step in flight, which then releases its
        memory. If that is not enough, make the step smaller until it fits."""
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
        self.loader.close()


def _step_target(config: EngineConfig, model: ModelInfo) -> float | None:
    """On a CPU small chunks compute nearly as many tokens a second as large ones do; a GPU is not filled by them."""
    if config.step_target is None and not model.is_on_gpu:
        return _CPU_STEP_SECONDS
    return config.step_target


class Reporter(Protocol):
    def __call__(self, name: str, seconds: float, detail: str) -> None: ...


def build_engine(
    config: EngineConfig,
    report: Reporter,
    source: ModelSource | None = None,
    starts: EarlierStarts | None = None,
) -> tuple[Engine, Ready]:
    """Load the model and put an engine around it; `source` is the model where it was resolved before, `starts` those
    that this one may go on from. Raises ModelError."""
    from softbatch.scheduler.model.loader import load

    loaded = load(config, report, source, starts)
    kv = loaded.kv_cache
    scheduler = Scheduler(
        SchedulerConfig(
            max_batch_size=config.max_batch_size,
            max_batch_tokens=config.max_batch_tokens,
            step_target=_step_target(config, loaded.info),
            max_model_len=loaded.info.max_model_len,
            # As many in the background beside all others.
            max_queue_size=2 * (config.max_queue_size + config.max_batch_size),
            num_blocks=kv.num_blocks,
            block_size=kv.block_size,
            eos_token_ids=frozenset(loaded.info.eos_token_ids),
            reuses_output=not config.deterministic,
            max_scored_tokens=max(1, _SCORED_LOGITS_BYTES // (4 * loaded.info.vocab_size)),
            length_rule=loaded.length_rule,
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
