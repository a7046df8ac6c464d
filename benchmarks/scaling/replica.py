"""One replica of a simulated cluster: the real scheduler, and a clock that stands where the model stands."""

from __future__ import annotations

import heapq
import zlib
from dataclasses import dataclass

from softbatch.scheduler.protocol import AddRequest, SamplingParams, SoftPromptRef
from softbatch.scheduler.scheduler import Scheduler
from softbatch.scheduler.scheduler_config import SchedulerConfig
from softbatch.scheduler.step import Step, StepResult


@dataclass(frozen=True)
class Machine:
    """What one replica is, and how long its work takes. Seconds of a step are `fixed`, `row` for each sequence that
    decodes, and `token` for each prompt token; a soft prompt that is not in the KV blocks takes `load`, its way from
    the store included."""

    fixed: float = 0.0050
    row: float = 0.00042
    token: float = 0.00025
    load: float = 0.015
    slots: int = 32
    kv_blocks: int = 2912
    block_size: int = 16
    step_target: float = 0.05
    max_batch_tokens: int = 1024
    bytes_per_block: int = 16 * 23_040


@dataclass
class Asked:
    """A request: when it came, which soft prompt it names, and when its first token was there."""

    arrived: float
    soft_prompt: int
    replica: int = -1
    first_token: float | None = None


class Replica:
    """Runs what it is sent; `outstanding` counts those that have not ended."""

    def __init__(self, machine: Machine, virtual_tokens: int, prompt_tokens: int, output_tokens: int) -> None:
        self.machine = machine
        self.outstanding = 0
        self._virtual_tokens = virtual_tokens
        self._prompt_tokens = prompt_tokens
        self._params = SamplingParams(max_tokens=output_tokens, temperature=0, ignore_eos=True)
        self._asked: dict[str, Asked] = {}
        self._loads: list[tuple[float, str]] = []  # when each will have been read
        self._in_flight: tuple[Step, StepResult] | None = None
        self._ends = 0.0  # the step in flight
        self.scheduler = Scheduler(
            SchedulerConfig(
                max_batch_size=machine.slots,
                max_batch_tokens=machine.max_batch_tokens,
                max_model_len=8192,
                max_queue_size=1_000_000,
                num_blocks=machine.kv_blocks,
                block_size=machine.block_size,
                eos_token_ids=frozenset((0,)),
                step_target=machine.step_target,
            )
        )

    def warm(self, soft_prompts: range | list[int]) -> None:
        """Have these resident, the first of them used last, as far as there is room beside a full batch."""
        spare = self.machine.slots * (-(-(self._prompt_tokens + self._params.max_tokens) // 16) + 1)
        for soft_prompt in reversed(soft_prompts):
            reserved = self.scheduler.soft_prompts.reserve(self._ref(soft_prompt), spare)
            if reserved is None:
                return
            self.scheduler.soft_prompts.mark_ready(reserved)

    def room_for_soft_prompts(self) -> int:
        blocks = -(-self._virtual_tokens // self.machine.block_size)
        busy = self.machine.slots * (-(-(self._prompt_tokens + self._params.max_tokens) // 16) + 1)
        return max(0, self.machine.kv_blocks - busy) // blocks

    def add(self, name: str, asked: Asked) -> None:
        self._asked[name] = asked
        self.outstanding += 1
        start = zlib.crc32(name.encode()) % 40_000
        request = AddRequest(
            request_id=name,
            token_ids=[(start + 7919 * index) % 40_000 + 1 for index in range(self._prompt_tokens)],
            params=self._params,
            soft_prompt=self._ref(asked.soft_prompt),
        )
        refused = self.scheduler.add(request)
        assert refused is None, refused

    def advance(self, now: float) -> float | None:
        """Begin the next step, unless one runs. Returns when to look again; None: that is known already, or nothing
        happens before the next request."""
        if self._in_flight is not None:
            if now < self._ends:
                return None
            self._end_step(*self._in_flight, now)
            self._in_flight = None
        while self._loads and self._loads[0][0] <= now:
            self.scheduler.soft_prompt_loads.finish(heapq.heappop(self._loads)[1])
        step = self.scheduler.schedule()
        for ref in step.soft_prompts_to_load:
            heapq.heappush(self._loads, (now + self.machine.load, ref.sha256))
        if not step:
            return self._loads[0][0] if self._loads else None
        seconds = self._seconds(step)
        ends = {row.sequence.request_id: 1 for row in step.rows if row.end == row.sequence.length}
        result = StepResult(tokens=ends, logprobs={}, scores={}, errors={}, prefill_errors={})
        self.scheduler.mark_in_flight(step)
        self.scheduler.observe(step, seconds)
        self._in_flight, self._ends = (step, result), now + seconds
        return self._ends

    def _end_step(self, step: Step, result: StepResult, now: float) -> None:
        for output in self.scheduler.postprocess(step, result):
            asked = self._asked[output.request_id]
            if output.token_ids and asked.first_token is None:
                asked.first_token = now
            if output.finish_reason is not None:
                del self._asked[output.request_id]
                self.outstanding -= 1

    def _seconds(self, step: Step) -> float:
        machine = self.machine
        prefilled = sum(row.num_tokens for row in step.rows if row.num_tokens > 1)
        decoding = sum(1 for row in step.rows if row.num_tokens == 1)
        return machine.fixed + machine.row * decoding + machine.token * prefilled

    def _ref(self, soft_prompt: int) -> SoftPromptRef:
        return SoftPromptRef(f"{soft_prompt:08d}", "", self._virtual_tokens)
