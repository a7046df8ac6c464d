"""What is known of the HTTP request that is being served: its id, whose it is, and what it has started."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Protocol

from softbatch.scheduler.protocol import Moment, SamplingParams


class Started(Protocol):
    """A request that the engine has been given. Times are monotonic seconds; `moments` are the engine's, if traced."""

    @property
    def request_id(self) -> str: ...

    @property
    def params(self) -> SamplingParams: ...

    @property
    def soft_prompt(self) -> str | None: ...

    @property
    def context_tokens(self) -> int: ...

    @property
    def num_cached(self) -> int: ...

    @property
    def priority(self) -> int: ...

    @property
    def arrived(self) -> float: ...

    @property
    def submitted(self) -> float | None: ...

    @property
    def started(self) -> float | None: ...

    @property
    def first_token(self) -> float | None: ...

    @property
    def last_token(self) -> float | None: ...

    @property
    def moments(self) -> Sequence[Moment]: ...

    @property
    def end_reason(self) -> str | None: ...

    @property
    def prompt_tokens(self) -> int: ...

    @property
    def virtual_tokens(self) -> int: ...

    @property
    def generated(self) -> int: ...

    @property
    def token_ids(self) -> list[int]:
        """Choices of one prompt share this very list."""
        ...


@dataclass(eq=False)
class RequestRecord:
    """`id` is the client's own X-Request-Id, or one made here; it goes back in the same header. `owner` tells the API
    keys of a server apart, and is empty where there is at most one. An admin is whoever may do everything. What is
    asked in the background goes behind everything else, and nobody waits for it.

    `model` is what the client asked for, `error` the code of the error that it got, in a stream too. `trace_id` is that
    of the trace it belongs to, the client's own or one made here; `is_traced` if somebody records it."""

    id: str
    owner: str = ""
    is_admin: bool = True
    is_background: bool = False
    trace_id: str | None = None
    is_traced: bool = False
    model: str | None = None
    is_streamed: bool = False
    error: str | None = None
    started: list[Started] = field(default_factory=list)

    @property
    def prompt_tokens(self) -> int:
        """Virtual tokens included; a prompt counts once, however many choices it has."""
        prompts = {id(active.token_ids): active for active in self.started}
        return sum(active.prompt_tokens + active.virtual_tokens for active in prompts.values())

    @property
    def completion_tokens(self) -> int:
        return sum(active.generated for active in self.started)


_current: ContextVar[RequestRecord | None] = ContextVar("current", default=None)


def begin(record: RequestRecord) -> None:
    """From here on, whatever this task and its children start belongs to the record."""
    _current.set(record)


def current() -> RequestRecord:
    """Outside of a request, that of nobody in particular."""
    return _current.get() or RequestRecord("")


def own_salt(given: str) -> str:
    """The cache salt of the request being served: prefixes are shared among the requests of one owner alone."""
    owner = current().owner
    return f"{owner}\0{given}" if owner else given


def share_owner(user: str) -> str:
    """With whom the request being served shares a part of the server: the holder of its API key or, where keys do not
    tell, the `user` that it names."""
    return current().owner or (hashlib.sha256(user.encode()).hexdigest()[:12] if user else "")


def note_start(active: Started) -> None:
    """The HTTP request that is being served, if there is one, has given a request to the engine."""
    record = _current.get()
    if record is not None:
        record.started.append(active)
