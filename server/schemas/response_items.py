"""The conversation of a `POST /v1/responses`: a text, or items."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from softbatch.server.request_failures import shown
from softbatch.server.requests.output_format import OutputFormat
from softbatch.server.schemas.base import Neutral, RequestModel, Text, refusal
from softbatch.server.schemas.chat import MAX_MESSAGES, MAX_PARTS
from softbatch.server.schemas.sampling import at_most_items
from softbatch.server.schemas.structured import ANY_OBJECT, Description, Name, SchemaText

_TEXTS = ("input_text", "output_text", "text")


class ItemText(RequestModel):
    """A text of a turn; of an earlier output it has notes too, which the model is not told of."""

    is_open: ClassVar[bool] = True
    without_effect: ClassVar[frozenset[str]] = frozenset({"annotations", "logprobs", "prompt_cache_breakpoint"})

    type: Literal["input_text", "output_text", "text"]
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


class TurnItem(RequestModel):
    """One turn. `developer` is the newer name of `system`. An earlier output can be sent back as it came."""

    is_open: ClassVar[bool] = True
    without_effect: ClassVar[frozenset[str]] = frozenset({"id", "status", "phase"})

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        list[ItemText],
        Field(fail_fast=True),
        at_most_items(MAX_PARTS),
        BeforeValidator(_as_texts, json_schema_input_type=str | list[ItemText]),
    ] = Field(description="a text, or a list of text parts")

    @property
    def part(self) -> tuple[str, str]:
        role = "system" if self.role == "developer" else self.role
        return role, "\n".join(text.text for text in self.content)


def _as_items(value: object) -> object:
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if not isinstance(value, list) or not value:
        raise refusal("input", "must be a text or a list of items such as {'role': 'user', 'content': '...'}")
    for index, item in enumerate(value[:MAX_MESSAGES]):
        kind = item.get("type") if isinstance(item, dict) else None
        if isinstance(kind, str) and kind != "message":
            message = f"items of type {shown(kind)} are not supported, only 'message'"
            raise refusal("unsupported_item", message, f"{index}.type")
    return value


InputItems = Annotated[
    list[TurnItem],
    Field(fail_fast=True),
    at_most_items(MAX_MESSAGES),
    BeforeValidator(_as_items, json_schema_input_type=str | list[TurnItem]),
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
