"""`POST /v1/embeddings`: OpenAI's request and reply."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from softbatch.server.schemas.base import MAX_INT32, Neutral, Text
from softbatch.server.schemas.completions import Prompt, one_or_several
from softbatch.server.schemas.sampling import QueuedRequest

MAX_INPUTS = 2048

Inputs = Annotated[list[Prompt], one_or_several(MAX_INPUTS, "inputs")]


class EmbeddingRequest(QueuedRequest):
    """Texts as vectors of length one, each behind the soft prompt if there is one.

    Fields that would change them and are not supported are refused.
    """

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"input": ["The harbour office opens at seven.", "When does it open?"]}]}
    )
    without_effect: ClassVar[frozenset[str]] = frozenset({"metadata", "service_tier", "request_id"})
    unsupported: ClassVar[Neutral] = {
        "messages": (),
        "input_type": (),
        "prompt_name": (),
        "normalize": (True,),
        "truncate": (False, "NONE"),
        "truncate_prompt_tokens": (),
        "embed_dtype": ("float32",),
        "endianness": ("native", "little"),
    }

    input: Inputs = Field(description=f"a text, token ids, or a list of at most {MAX_INPUTS} of either")
    encoding_format: Literal["float", "base64"] = Field(
        default="float", description="base64: the bytes of the numbers as float32, little-endian"
    )
    dimensions: int | None = Field(
        default=None,
        ge=1,
        le=MAX_INT32,
        description="keep so many of the numbers, and make the vector's length one again; left out: all",
    )
    pooling: Literal["mean", "last"] | None = Field(
        default=None,
        description="of the last hidden states: their mean, or the last token's; left out: the server's "
        "--embedding-pooling; not from OpenAI's API",
    )
    add_special_tokens: bool = Field(
        default=True, description="as the tokenizer does it, e.g. BOS in front; not from OpenAI's API"
    )
    user: Text = Field(
        default="",
        description="who asks, if API keys do not tell: users have equal shares of the server, as keys have",
    )


class Embedding(BaseModel):
    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str = Field(description="numbers, or with `encoding_format` base64 their bytes")


class EmbeddingUsage(BaseModel):
    """`prompt_tokens` counts a soft prompt's virtual tokens too, once for every text."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingReply(BaseModel):
    """Embeddings in the order of the inputs."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage
