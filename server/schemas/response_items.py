"""The conversation of a `POST /v1/responses`, a text or items, and the form of its answer."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from softbatch.server.request_failures import shown
from softbatch.server.requests.output_format import OutputFormat
from softbatch.server.schemas.base import Neutral, RequestModel, Text, refusal
from softbatch.server.schemas.chat import MAX_MESSAGES, MAX_PARTS
from softbatch.server.schemas.joined_turns import call_of
from softbatch.server.schemas.sampling import at_most_items
from softbatch.server.schemas.structured import ANY_OBJECT, Description, Name, SchemaText
from softbatch.server.schemas.tools import Identifier

_TEXTS = ("input_text", "output_text", "reasoning_text", "text")


class ItemText(RequestModel):
    """A text of a turn; of an earlier output it has notes too, which the model is not told of."""

    is_open: ClassVar[bool] = True
    without_effect: ClassVar[frozenset[str]] = frozenset({"annotations", "logprobs", "prompt_cache_breakpoint"})

    type: Literal["input_text", "output_text", "reasoning_text", "text"]
    text: Text


def _as_texts(value: object) -> object:
    if isinstance(value, str):
        return [{"type": "input_text", "text": value}]
    if not isinstance(value, list):
        raise refusal("content", "must be a text or a list of parts such as {'type': 'input_text', 'text': '...'}")
    for index, part in enumerate(value[:MAX_PARTS]):
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind not in _TEXTS:
            message = f"parts of type {shown(kind)} are not supported, only 'input_text' and 'output_text'"
            raise refusal("unsupported_part", message, f"{index}.type")
    return value


_NEEDED = {
    "message": ("role", "content"),
    "function_call": ("call_id", "name", "arguments"),
    "function_call_output": ("call_id", "output"),
    "reasoning": (),
}


Texts = Annotated[
    list[ItemText],
    Field(fail_fast=True),
    at_most_items(MAX_PARTS),
    BeforeValidator(_as_texts, json_schema_input_type=str | list[ItemText]),
]


class InputItem(RequestModel):
    """A turn, a call of a tool, its result, or what the model thought. Which fields it has is up to its type.

    `developer` is the newer name of `system`. An earlier output can be sent back as it came.
    """

    is_open: ClassVar[bool] = True
    without_effect: ClassVar[frozenset[str]] = frozenset({"id", "status", "phase", "summary", "encrypted_content"})

    type: Literal["message", "function_call", "function_call_output", "reasoning"] = "message"
    role: Literal["system", "developer", "user", "assistant"] = "assistant"
    content: Texts = Field(default=[], description="a text, or a list of text parts")
    call_id: Identifier = Field(default="", description="of a call, and of its result")
    name: Identifier = Field(default="", description="of the tool that is called")
    arguments: Text = Field(default="", description="of the call, JSON text")
    output: Texts = Field(default=[], description="the call's result: a text, or a list of text parts")

    @model_validator(mode="after")
    def _is_whole(self) -> InputItem:
        for name in _NEEDED[self.type]:
            if name not in self.model_fields_set:
                raise PydanticCustomError("missing", "field required", {"param": name})
        return self

    @property
    def turn(self) -> dict[str, Any]:
        """As chat templates want it."""
        content = "\n".join(text.text for text in self.content)
        if self.type == "function_call":
            calls = [call_of(self.call_id, self.name, self.arguments)]
            return {"role": "assistant", "content": "", "tool_calls": calls}
        if self.type == "function_call_output":
            result = "\n".join(text.text for text in self.output)
            return {"role": "tool", "content": result, "tool_call_id": self.call_id}
        if self.type == "reasoning":
            return {"role": "assistant", "content": "", "reasoning": content, "reasoning_content": content}
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


def _as_items(value: object) -> object:
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if not isinstance(value, list) or not value:
        raise refusal("input", "must be a text or a list of items such as {'role': 'user', 'content': '...'}")
    for index, item in enumerate(value[:MAX_MESSAGES]):
        kind = item.get("type") if isinstance(item, dict) else None
        if isinstance(kind, str) and kind not in _NEEDED:
            message = f"items of type {shown(kind)} are not supported, only {', '.join(map(repr, _NEEDED))}"
            raise refusal("unsupported_item", message, f"{index}.type")
    return value


InputItems = Annotated[
    list[InputItem],
    Field(fail_fast=True),
    at_most_items(MAX_MESSAGES),
    BeforeValidator(_as_items, json_schema_input_type=str | list[InputItem]),
]


class TextFormat(RequestModel):
    """OpenAI's `text.format`: the form of the output, which follows a schema whatever `strict` says."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: Name | None = None
    description: Description | None = None
    schema_text: SchemaText | None = Field(default=None, alias="schema")
    strict: bool = False

    @model_validator(mode="after")
    def _has_its_schema(self) -> TextFormat:
        if (self.type == "json_schema") != (self.schema_text is not None):
            needed = "is needed" if self.schema_text is None else "is only allowed"
            raise refusal("json_schema", f"{needed} with type 'json_schema'", "schema")
        return self


class TextConfig(RequestModel):
    """How the text of the output is to be."""

    unsupported: ClassVar[Neutral] = {"verbosity": ("medium",)}

    format: TextFormat = TextFormat()

    def output_format(self, param: str) -> OutputFormat | None:
        if self.format.type == "text":
            return None
        if self.format.schema_text is None:
            return OutputFormat("json_schema", ANY_OBJECT, f"{param}.format")
        return OutputFormat("json_schema", self.format.schema_text, f"{param}.format.schema")
