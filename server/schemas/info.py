"""`/version`, `/info`, `/health*` and `/v1/queue`: what the server says about itself."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field


class Version(BaseModel):
    version: str


class Info(BaseModel):
    """text-generation-inference's names first, then our own."""

    model_id: str
    model_dtype: str
    quantization: str
    kv_cache_dtype: str
    model_device_type: str
    max_concurrent_requests: int = Field(description="running and waiting together")
    max_input_tokens: int
    max_total_tokens: int
    default_max_tokens: int = Field(description="of a chat's answer if the request names no limit")
    version: str
    slots: int = Field(description="sequences that run at once")
    max_queue_size: int
    max_batch_tokens: int = Field(description="token budget of a step")
    kv_blocks: int
    block_size: int
    attention: str
    num_parameters: int
    model_fingerprint: str = Field(description="soft prompts must carry the same")
    max_soft_prompt_bytes: int = Field(description="of a soft prompt file")


class Health(BaseModel):
    status: Literal["ok"] = "ok"


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


class Queue(BaseModel):
    """The batch and the queue behind it at this moment; `waiting` is in order of priority and arrival.

    Where several API keys are set, a key sees its own requests, and an admin key all; the others are counted."""

    slots: int
    running: list[QueueEntry]
    waiting: list[QueueEntry]
    others_running: int = Field(default=0, description="requests of other API keys")
    others_waiting: int = Field(default=0, description="requests of other API keys")
