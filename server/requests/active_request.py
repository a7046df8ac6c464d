"""A request that the engine has, as the front end knows it."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from softbatch.scheduler.protocol import MAX_PRIORITY, AddRequest, Moment, SamplingParams, SequenceOutput
from softbatch.server.journal import Journal, SequenceOpened, kept_journal
from softbatch.server.observability.request_record import current
from softbatch.server.request_failures import Failure
from softbatch.server.requests.deadline import Deadline
from softbatch.server.requests.leases import Lease


@dataclass(eq=False)
class ActiveRequest:
    """The front end's knowledge of a request that the engine has; `outputs` are those not yet taken.

    `add` and `received` are all that another engine needs to go on. The engine knows the request as `sequence_id`, a
    new one each time, so that nothing late from an earlier sequence counts; None while it is held back. `alive_since`
    is when that sequence brought its first token, `deaths` how many engines in a row have died on the request. `alarm`
    rings at the deadline, if there is one. `moments` are the engine's, if the request is traced. `created` is in Unix
    seconds. If there is a `journal`, `resumed` is what other servers have brought, and this is number `place` in it.
    """

    add: AddRequest
    route: str
    soft_prompt: str | None
    context_tokens: int
    arrived: float
    created: int = field(default_factory=lambda: int(time.time()))
    journal: Journal | None = None
    place: int = 0
    resumed: list[list[SequenceOutput]] = field(default_factory=list)
    owner: str = field(default_factory=lambda: current().owner)
    submitted: float | None = None
    started: float | None = None
    first_token: float | None = None
    last_token: float | None = None
    state: Literal["waiting", "running"] = "waiting"
    num_computed: int = 0
    num_cached: int = 0
    received: list[int] = field(default_factory=list)
    outputs: list[SequenceOutput] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    error: Failure | None = None
    sequence_id: str | None = None
    num_sequences: int = 0
    alive_since: float | None = None
    deaths: int = 0
    deadline: Deadline | None = None
    alarm: asyncio.TimerHandle | None = None
    moments: list[Moment] = field(default_factory=list)
    end_reason: str | None = None

    @classmethod
    def of(
        cls,
        add: AddRequest,
        lease: Lease | None,
        route: str,
        arrived: float,
        deadline: Deadline | None = None,
        opened: SequenceOpened | None = None,
    ) -> ActiveRequest:
        context = lease.stored.manifest.context if lease else None
        request = cls(
            add=add,
            route=route,
            soft_prompt=lease.stored.name if lease else None,
            context_tokens=context.num_tokens if context else 0,
            arrived=arrived,
            deadline=deadline,
        )
        if opened is not None:
            request.created, request.place = opened.created, opened.place
            request.journal = kept_journal()
            if request.journal is not None:
                request._resume(request.journal.brought(opened.place))
        return request

    def _resume(self, brought: list[list[SequenceOutput]]) -> None:
        """Take over from another server, which got these outputs of it."""
        self.resumed = brought
        outputs = [output for together in brought for output in together]
        self.received = [token_id for output in outputs for token_id in output.token_ids]
        if outputs:
            self.num_cached = outputs[0].num_cached
            self.num_sequences = 1
            if self.deadline is not None:
                self.deadline.has_output |= bool(self.received)

    @property
    def has_ended_elsewhere(self) -> bool:
        """Whether all of it is in `resumed`."""
        return bool(self.resumed) and self.resumed[-1][-1].finish_reason is not None

    @property
    def ended_at(self) -> int:
        """In Unix seconds, of one that has ended: the same on a server that says it again."""
        return int(time.time()) if self.journal is None else self.journal.ended_at(self.place)

    def start_sequence(self) -> AddRequest:
        """What the engine is sent: the prompt, and behind it all that has been generated so far."""
        self.sequence_id = f"{self.request_id}-{self.num_sequences}" if self.num_sequences else self.request_id
        self.num_sequences += 1
        if self.num_sequences == 1:
            return self.add
        return msgspec.structs.replace(
            self.add,
            request_id=self.sequence_id,
            token_ids=self.add.token_ids + self.received,
            num_delivered=len(self.received),
        )

    def end_sequence(self) -> None:
        """The engine does not have it any more."""
        self.sequence_id = None
        self.state = "waiting"
        self.num_computed = 0
        self.alive_since = None

    @property
    def request_id(self) -> str:
        return self.add.request_id

    @property
    def token_ids(self) -> list[int]:
        return self.add.token_ids

    @property
    def prompt_tokens(self) -> int:
        return len(self.add.token_ids)

    @property
    def virtual_tokens(self) -> int:
        return self.add.soft_prompt.num_virtual_tokens if self.add.soft_prompt else 0

    @property
    def generated(self) -> int:
        return len(self.received)

    @property
    def max_tokens(self) -> int:
        return self.add.params.max_tokens

    @property
    def is_background(self) -> bool:
        return self.add.priority > MAX_PRIORITY

    @property
    def priority(self) -> int:
        return self.add.priority

    @property
    def params(self) -> SamplingParams:
        return self.add.params
