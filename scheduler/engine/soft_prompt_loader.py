"""Brings soft prompts into the KV cache: reads their files in a thread of its own, so that no step waits for a disk."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from softbatch.scheduler.protocol import SoftPromptRef
from softbatch.scheduler.scheduler import Scheduler
from softbatch.scheduler.soft_prompt_cache import LoadState, ResidentSoftPrompt
from softbatch.scheduler.step import (
    TOO_LITTLE_MEMORY,
    DeviceLost,
    OutOfDeviceMemory,
    SoftPromptLoad,
    Step,
    StepReport,
)

if TYPE_CHECKING:
    from softbatch.scheduler.model.runner import StagedSoftPrompt

logger = logging.getLogger(__name__)


class SoftPromptRunner(Protocol):
    """What the loader asks of the model side."""

    def prepare_to_read(self) -> None:
        """Called once in the thread that reads, before anything is read."""
        ...

    def read_soft_prompt(self, ref: SoftPromptRef) -> StagedSoftPrompt:
        """Called in the thread that reads. Raises SoftPromptError."""
        ...

    def place_soft_prompt(self, resident: ResidentSoftPrompt, staged: StagedSoftPrompt) -> bool:
        """True if the keys and values are in the blocks now, False if steps have to compute them.

        Raises OutOfDeviceMemory and DeviceLost."""
        ...


@dataclass(frozen=True, eq=False)
class _Read:
    """The reading of one file, from when it was asked for (monotonic)."""

    ref: SoftPromptRef
    since: float
    staged: Future[StagedSoftPrompt]


class SoftPromptLoader:
    """Owns every load from the start of its reading until the soft prompt is ready or has failed, and its time.

    The scheduler decides what is loaded and owns the blocks. `on_read` is called, in any thread, whenever there may be
    something to place. Not thread-safe, except `prefetch`.
    """

    def __init__(self, scheduler: Scheduler, runner: SoftPromptRunner) -> None:
        self.on_read: Callable[[], None] = _do_nothing
        self._scheduler = scheduler
        self._runner = runner
        self._thread = ThreadPoolExecutor(1, "soft-prompt-reader", initializer=runner.prepare_to_read)
        self._reads: dict[str, _Read] = {}  # by content hash, until they are placed
        self._lock = threading.Lock()  # for `_reads`
        self._prefilling: dict[str, tuple[ResidentSoftPrompt, float]] = {}  # and when their loads began

    @property
    def num_reading(self) -> int:
        """Files that are being read, or have been read and are not placed yet."""
        return len(self._reads)

    def prefetch(self, ref: SoftPromptRef) -> None:
        """Read a soft prompt before its request is scheduled, if the next step would load it. Thread-safe."""
        scheduler = self._scheduler
        if scheduler.soft_prompt_loads.should_prefetch(ref, self.num_reading, len(scheduler.running)):
            self.read(ref)

    def start(self, step: Step) -> None:
        """Read what the step asks for."""
        while step.soft_prompts_to_load:
            self.read(step.soft_prompts_to_load.pop(0))

    def read(self, ref: SoftPromptRef) -> None:
        """Read a file, unless that goes on already."""
        with self._lock:
            if ref.sha256 in self._reads:
                return
            read = _Read(ref, time.monotonic(), self._thread.submit(self._runner.read_soft_prompt, ref))
            self._reads[ref.sha256] = read
        read.staged.add_done_callback(lambda _: self.on_read())

    def place_read(self, report: StepReport) -> bool:
        """Place the soft prompts whose files have been read; False if there were none.

        A soft prompt that no sequence waits for, because its request was prefetched but did not come, is dropped."""
        reads = self._take_done()
        for read in reads:
            resident = self._scheduler.soft_prompts.get(read.ref.sha256)
            if resident is not None and resident.state is LoadState.READING:
                self._place(read, resident, report)
        return bool(reads)

    def report_prefilled(self, report: StepReport) -> None:
        """Report the load times of soft prompts whose keys and values have been computed by now."""
        for sha256, (resident, since) in list(self._prefilling.items()):
            if resident.state is LoadState.READY:
                load = SoftPromptLoad(resident.ref.content, since, time.monotonic())
                report.soft_prompt_loads.append(load)
            elif self._scheduler.soft_prompts.get(sha256) is resident:
                continue
            del self._prefilling[sha256]

    def close(self) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _take_done(self) -> list[_Read]:
        with self._lock:
            done = [read for read in self._reads.values() if read.staged.done()]
            for read in done:
                del self._reads[read.ref.sha256]
        return done

    def _place(self, read: _Read, resident: ResidentSoftPrompt, report: StepReport) -> None:
        loads, sha256 = self._scheduler.soft_prompt_loads, read.ref.sha256
        try:
            is_ready = self._runner.place_soft_prompt(resident, read.staged.result())
        except OutOfDeviceMemory:
            if self._scheduler.running:  # there may be room once a sequence has left
                self._scheduler.pause_admission()
                with self._lock:
                    self._reads.setdefault(sha256, read)
            else:
                report.outputs += loads.fail(sha256, f"soft prompt: {TOO_LITTLE_MEMORY}")
        except DeviceLost:
            raise
        except Exception as error:
            logger.exception("soft prompt %s cannot be loaded", sha256)
            reason = str(error) if isinstance(error, ValueError) else "it cannot be read"
            report.outputs += loads.fail(sha256, f"soft prompt: {reason}")
        else:
            if is_ready:
                loads.finish(sha256)
                report.soft_prompt_loads.append(SoftPromptLoad(read.ref.content, read.since, time.monotonic()))
            else:
                loads.start_prefill(sha256)
                self._prefilling[sha256] = (resident, read.since)


def _do_nothing() -> None:
    pass
