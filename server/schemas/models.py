"""`GET /v1/models`."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

# What clients call a model that they know no name of; never a name that could be a soft prompt misspelt.
PLACEHOLDERS = frozenset({"", "tgi", "dummy", "default", "none", "model", "local-model", "unused", "placeholder"})


class ModelCard(BaseModel):
    """Something that `model` may name: the base model, or a soft prompt on it."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["softbatch"] = "softbatch"
    root: str = Field(description="the base model")
    parent: str | None = Field(description="the base model, for a soft prompt")
    max_model_len: int = Field(description="tokens in a sequence, those of the soft prompt included")


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]
