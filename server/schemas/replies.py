"""What the OpenAI routes answer with, apart from the texts themselves."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, Field

from softbatch.server.version import VERSION

# Some clients cannot read a reply without one.
SYSTEM_FINGERPRINT = f"softbatch-{VERSION}"


def is_none(value: Any) -> bool:
    """For fields that are left out of the JSON, rather than null, when they have no value."""
    return value is None


class CachedTokens(BaseModel):
    cached_tokens: int = Field(
        description="virtual tokens of the soft prompt, computed once for everybody, and prompt tokens found in the "
        "prefix cache"
    )
    recalled_tokens: int | None = Field(
        default=None,
        exclude_if=is_none,
        description="prompt tokens of passages that were recalled of the soft prompt's kept text",
    )


class RecalledPassage(BaseModel):
    """A passage that stood before the question, with what stands above it; `start` and `end` are its place in the kept
    text, in characters."""

    text: str
    start: int
    end: int


RecalledPassages = Annotated[
    list[RecalledPassage] | None,
    Field(default=None, exclude_if=is_none, description="with `return_recalled`: of all prompts in turn, best first"),
]


class Usage(BaseModel):
    """Tokens the model attended to: `prompt_tokens` counts the soft prompt's virtual tokens too."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens
