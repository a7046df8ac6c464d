"""The engine's client beside a scheduler in the same process, which runs a step when a test says so."""

from __future__ import annotations

from pathlib import Path

from softbatch.scheduler.protocol import (
    AddRequest,
    CancelRequest,
    EngineConfig,
    EngineInput,
    SamplingParams,
    StepOutput,
)
from softbatch.server.observability.metrics import Metrics
from softbatch.server.requests.active_request import ActiveRequest
from softbatch.server.requests.deadline import Deadline
from softbatch.server.requests.engine_client import EngineClient
from softbatch.server.requests.engine_supervisor import EngineSupervisor, Patience
from tests.support.fake_runner import FakeRunner, make_scheduler


class InProcessEngine(EngineSupervisor):
    """Hands what it is sent to a scheduler; `computed` names the sequences that any step has computed for."""

    def __init__(self, slots: int = 2) -> None:
        super().__init__(EngineConfig(model="", max_batch_size=slots), Path(), Patience())
        self._context.destroy()
        self.slots = slots
        self.metrics = Metrics()
        self.client = EngineClient(self, self.metrics)
        self.computed: set[str] = set()
        self.revive()

    def revive(self) -> None:
        """A new engine, which knows of nothing; the client sends it everything."""
        self.scheduler = make_scheduler(max_batch_size=self.slots, max_model_len=200, num_blocks=400)
        self.runner = FakeRunner(self.scheduler)
        self.ready = True
        self.client._send_held()

    def die(self) -> None:
        self.ready = False
        self.client.engine_died()

    def send(self, message: EngineInput) -> None:
        assert self.ready
        if isinstance(message, AddRequest):
            assert self.scheduler.add(message) is None
        elif isinstance(message, CancelRequest):
            for request_id in message.request_ids:
                self.scheduler.cancel(request_id)

    def step(self) -> set[str]:
        """Run one; returns the sequences in it."""
        step = self.scheduler.schedule()
        names = {row.sequence.request_id for row in step.rows}
        self.computed |= names
        self.client.engine_admitting(step.report.admitted)
        outputs = self.scheduler.postprocess(step, self.runner.run(step))
        self.scheduler.check_integrity()
        stats = self.scheduler.stats(1)
        report = step.report
        self.client.engine_stepped(
            StepOutput(outputs=outputs, stats=stats, admitted=report.admitted, preempted=report.preempted)
        )
        return names

    def finished(self, reason: str) -> float:
        value = self.metrics.registry.get_sample_value("softbatch_requests_finished_total", {"reason": reason})
        return value or 0.0


def active_request(name: str, deadline: Deadline | None = None, max_tokens: int = 20) -> ActiveRequest:
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    return ActiveRequest.of(
        AddRequest(request_id=name, token_ids=[1, 2, 3], params=params), None, "", 0.0, deadline=deadline
    )
