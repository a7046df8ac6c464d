"""A request that the engine has, as the front end knows it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Literal

from softbatch.scheduler.protocol import AddRequest, SequenceOutput
from softbatch.server.request_failures import Failure
from softbatch.server.requests.leases import Lease


@dataclass(eq=False)
class ActiveRequest:
    """The front end's knowledge of a request that the engine has; `outputs` are those not yet taken.

    It holds everything a restarted engine would need to go on: what was asked (`add`) and what came (`received`).
    """

    add: AddRequest
    route: str
    soft_prompt: str | None
    context_tokens: int
    arrived: float
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

    @classmethod
    def of(cls, add: AddRequest, lease: Lease | None, route: str, arrived: float) -> ActiveRequest:
        context = lease.stored.manifest.context if lease else None
        return cls(
            add=add,
            route=route,
            soft_prompt=lease.stored.name if lease else None,
            context_tokens=context.num_tokens if context else 0,
            arrived=arrived,
        )

    @property
    def request_id(self) -> str:
        return self.add.request_id

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
    def priority(self) -> int:
        return self.add.priority
