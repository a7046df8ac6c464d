"""`/v1/queue*`: the batch and the queue, at once or live."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field


class RequestProgress(BaseModel):
    """How far a request has come, in tokens."""

    num_computed: int = Field(description="positions whose keys and values are in the cache")
    generated: int
    max_tokens: int


class QueueEntry(BaseModel):
    id: str
    state: Literal["waiting", "running"]
    route: str
    age_seconds: float
    priority: int
    soft_prompt: str | None
    prompt_tokens: int
    virtual_tokens: int
    progress: RequestProgress


class QueueRequest(QueueEntry):
    """One of them, with what it says."""

    prompt: str = Field(description="text of its last 4096 tokens at most, virtual ones left out")
    output: str = Field(description="what it has generated so far, of which the last 4096 tokens at most")
    is_cut: bool = Field(description="whether the prompt or the output has more tokens than these")


class QueueCancelled(BaseModel):
    id: str
    cancelled: Literal[True] = True


class Queue(BaseModel):
    """The batch and the queue behind it at this moment; `waiting` is in order of priority and arrival.

    Where several API keys are set, a key sees its own requests, and an admin key all; the others are counted."""

    slots: int
    running: list[QueueEntry]
    waiting: list[QueueEntry]
    others_running: int = Field(default=0, description="requests of other API keys")
    others_waiting: int = Field(default=0, description="requests of other API keys")


class LiveHistory(BaseModel):
    """Columns of figures, one place for every two seconds; `at` is in Unix seconds."""

    at: list[float]
    running: list[int]
    waiting: list[int]
    tokens_per_second: list[float] = Field(description="generated, over the two seconds")
    first_token_seconds: list[float | None] = Field(
        description="from arrival to the first token: mean of the requests that got it in these seconds"
    )
    kv_usage: list[float] = Field(description="share of the KV blocks in use, 0 to 1")
    preemptions: list[int]
    rejections: list[int]


class LiveQueue(BaseModel):
    """An event of `/v1/queue/events`. Of long lists only the first entries are there; the counts are of all."""

    engine: Literal["ready", "restarting", "stalled", "draining"]
    num_running: int
    num_waiting: int
    queue: Queue
    history: LiveHistory = Field(description="what is new since the last event; in the first one, of ten minutes")
