"""What the turns of Anthropic's messages are made of: texts, calls of tools and their results, and thoughts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from softbatch.server.request_failures import shown
from softbatch.server.schemas.base import Neutral, RequestModel, Text, refusal
from softbatch.server.schemas.chat import MAX_PARTS
from softbatch.server.schemas.joined_turns import call_of
from softbatch.server.schemas.sampling import at_most_items
from softbatch.server.schemas.tools import Identifier, as_bounded

_NEEDED = {
    "text": ("text",),
    "tool_use": ("id", "name", "input"),
    "tool_result": ("tool_use_id",),
    "thinking": ("thinking",),
    "redacted_thinking": (),
}
_OF_ROLE = {
    "system": ("text",),
    "user": ("text", "tool_result"),
    "assistant": ("text", "tool_use", "thinking", "redacted_thinking"),
}


def blocks_of(*kinds: str) -> BeforeValidator:
    """A text, or blocks of these kinds."""

    def check(value: object) -> object:
        if isinstance(value, str):
            return [{"type": "text", "text": value}]
        if not isinstance(value, list):
            raise refusal("content", "must be a text or a list of blocks such as {'type': 'text', 'text': '...'}")
        for index, block in enumerate(value[:MAX_PARTS]):
            kind = block.get("type") if isinstance(block, dict) else None
            if isinstance(kind, str) and kind not in kinds:
                message = f"blocks of type {shown(kind)} are not supported, only {', '.join(map(repr, kinds))}"
                raise refusal("unsupported_block", message, f"{index}.type")
        return value

    return BeforeValidator(check, json_schema_input_type=str | list[TextBlock])


class TextBlock(RequestModel):
    """A text. Where a prefix is to be cached need not be said: the cache finds it."""

    is_open: ClassVar[bool] = True
    without_effect: ClassVar[frozenset[str]] = frozenset({"cache_control"})
    unsupported: ClassVar[Neutral] = {"citations": ([],)}

    type: Literal["text"]
    text: Text


Texts = Annotated[list[TextBlock], Field(fail_fast=True), at_most_items(MAX_PARTS), blocks_of("text")]


class MessageBlock(RequestModel):
    """Part of a turn. Which fields it has is up to its type."""

    is_open: ClassVar[bool] = True
    without_effect: ClassVar[frozenset[str]] = frozenset({"cache_control", "signature", "data", "caller"})
    unsupported: ClassVar[Neutral] = {"citations": ([],)}

    type: Literal["text", "tool_use", "tool_result", "thinking", "redacted_thinking"]
    text: Text = ""
    id: Identifier = Field(default="", description="of a call")
    name: Identifier = Field(default="", description="of the tool that is called")
    input: Annotated[dict[str, Any], BeforeValidator(as_bounded)] = Field(default={}, description="of the call")
    tool_use_id: Identifier = Field(default="", description="of the call that a result belongs to")
    content: Texts = Field(default=[], description="a result: a text, or a list of text blocks")
    is_error: bool = Field(default=False, description="the model is told that the call has failed")
    thinking: Text = Field(default="", description="thoughts of an earlier turn; templates leave most of them out")

    @model_validator(mode="after")
    def _is_whole(self) -> MessageBlock:
        for name in _NEEDED[self.type]:
            if name not in self.model_fields_set:
                raise PydanticCustomError("missing", "field required", {"param": name})
        return self

    @property
    def result(self) -> str:
        text = "\n".join(block.text for block in self.content)
        return f"Error: {text}" if self.is_error else text


class MessageTurn(RequestModel):
    """One turn. Control tokens that its text spells out, such as `<|im_end|>`, are text."""

    is_open: ClassVar[bool] = True

    role: Literal["user", "assistant", "system"]
    content: Annotated[list[MessageBlock], Field(fail_fast=True), at_most_items(MAX_PARTS), blocks_of(*_NEEDED)] = (
        Field(description="a text, or a list of blocks")
    )

    @model_validator(mode="after")
    def _fits_its_role(self) -> MessageTurn:
        for index, block in enumerate(self.content):
            if block.type not in _OF_ROLE[self.role]:
                message = f"a turn of role {self.role!r} has no blocks of type {block.type!r}"
                raise refusal("unsupported_block", message, f"content.{index}.type")
        return self

    def turns(self) -> Iterator[dict[str, Any]]:
        """As chat templates want them: results are turns of their own."""
        if not self.content:
            yield {"role": self.role, "content": ""}
        for block in self.content:
            if block.type == "text":
                yield {"role": self.role, "content": block.text}
            elif block.type == "tool_result":
                yield {"role": "tool", "content": block.result, "tool_call_id": block.tool_use_id}
            elif block.type == "tool_use":
                arguments = msgspec.json.encode(block.input).decode()
                call = call_of(block.id, block.name, arguments)
                yield {"role": self.role, "content": "", "tool_calls": [call]}
            elif block.type == "thinking":
                thoughts = {"reasoning": block.thinking, "reasoning_content": block.thinking}
                yield {"role": self.role, "content": "", **thoughts}
