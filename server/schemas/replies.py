"""What the OpenAI routes answer with, apart from the texts themselves."""

from __future__ import annotations

from typing import Any

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


class Usage(BaseModel):
    """Tokens the model attended to: `prompt_tokens` counts the soft prompt's virtual tokens too."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens
