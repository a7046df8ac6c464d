"""`/v1/soft_prompts`."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

from softbatch.prompt_store.manifest import Manifest
from softbatch.server.schemas.replies import is_none


class SoftPromptObject(BaseModel):
    """A registered soft prompt; `manifest` is what its file says about itself, measured fidelity included."""

    id: str
    object: Literal["soft_prompt"] = "soft_prompt"
    name: str
    created: int
    sha256: str = Field(description="of the file; its identity in every cache")
    bytes: int
    kind: Literal["embeddings", "kv"]
    num_virtual_tokens: int
    base_model: str
    context_tokens: int | None = Field(description="how long the compressed context was, where that is known")
    resident: bool = Field(description="whether its keys and values are in the KV cache at the moment")
    preview: bool = Field(
        default=False, description="whether it is a preview, whose place a trained one takes when its compression ends"
    )
    compression: str | None = Field(default=None, description="of a preview: the compression that made it")
    recall: int | None = Field(
        default=None,
        description="passages of its kept text that a request gets which does not say; null: no text is kept",
    )
    verdict: str | None = Field(default=None, description="what its compression's figures mean, in words")
    kl_closed: float | None = Field(
        default=None,
        description="measured fidelity: the closed part of the KL divergence between no context and the full one",
    )
    manifest: Manifest | None = Field(default=None, exclude_if=is_none)


class BrokenFile(BaseModel):
    """A file in the store that is not a usable soft prompt, and why."""

    name: str
    reason: str


class SoftPromptList(BaseModel):
    object: Literal["list"] = "list"
    data: list[SoftPromptObject]
    broken: list[BrokenFile] | None = Field(default=None, exclude_if=is_none)


class SoftPromptDeleted(BaseModel):
    id: str
    object: Literal["soft_prompt"] = "soft_prompt"
    deleted: Literal[True] = True
