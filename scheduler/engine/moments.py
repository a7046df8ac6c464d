"""When something happened to the sequences that are traced, for whoever makes spans of it."""

from __future__ import annotations

import time
from dataclasses import dataclass

from softbatch.scheduler.protocol import AddRequest, Moment, MomentKind
from softbatch.scheduler.step import StepReport


@dataclass
class _Traced:
    """`awaits` is the content hash of a soft prompt for as long as the sequence may be waiting for it."""

    awaits: str | None
    has_token: bool


class Moments:
    """Owns what is known of traced sequences until they leave. Where nobody traces, a step looks at an empty dict."""

    def __init__(self) -> None:
        self._traced: dict[str, _Traced] = {}
        self._news: list[Moment] = []

    def watch(self, request: AddRequest) -> None:
        """If it is traced, its moments are told from now on."""
        if request.traced:
            awaits = request.soft_prompt.sha256 if request.soft_prompt else None
            self._traced[request.request_id] = _Traced(awaits, has_token=request.num_delivered > 0)

    def forget(self, request_id: str) -> None:
        """The sequence was cancelled."""
        self._traced.pop(request_id, None)

    def planned(self, report: StepReport) -> None:
        """The step that is about to be launched computes for those who were admitted, no more for those preempted."""
        if not self._traced:
            return
        self._note_loads(report)
        now = time.monotonic()
        for request_id in report.preempted:
            self._note(request_id, "preempted", now)
        for request_id in report.admitted:
            if traced := self._traced.get(request_id):
                traced.awaits = None
                self._note(request_id, "admitted", now)

    def of_step(self, report: StepReport) -> list[Moment]:
        """All that is new at the end of an iteration."""
        if not self._traced:
            return []
        self._note_loads(report)
        now = time.monotonic()
        for output in report.outputs:
            traced = self._traced.get(output.request_id)
            if traced is None:
                continue
            if output.token_ids and not traced.has_token:
                traced.has_token = True
                self._note(output.request_id, "first_token", now)
            if output.finish_reason is not None:
                self._note(output.request_id, "ended", now)
                del self._traced[output.request_id]
        news, self._news = self._news, []
        return news

    def _note(self, request_id: str, kind: MomentKind, at: float) -> None:
        if request_id in self._traced:
            self._news.append(Moment(request_id, kind, at))

    def _note_loads(self, report: StepReport) -> None:
        for load in report.soft_prompt_loads:
            for request_id, traced in self._traced.items():
                if traced.awaits == load.sha256:
                    traced.awaits = None
                    self._news.append(Moment(request_id, "loaded", load.until, load.since))
