"""`/version`, `/info` and `/health*`: what the server says about itself."""

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
