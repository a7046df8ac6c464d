"""What every request body has in common: strict types, bounded sizes, no field ignored without saying so."""

from __future__ import annotations

import difflib
import functools
import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator
from pydantic_core import PydanticCustomError

from softbatch.server.request_failures import printable, shown

MAX_INT32 = 2**31 - 1
MAX_NAME_CHARS = 256

# Unsupported field -> the values of it that ask for nothing.
Neutral = Mapping[str, tuple[object, ...]]


def refusal(kind: str, message: str, param: str = "") -> PydanticCustomError:
    """An error for a validator to raise; `param` is the field below the one being validated."""
    context = {"message": message, "param": param} if param else {"message": message}
    return PydanticCustomError(kind, "{message}", context)


# Bounded like a whole body; with any bound pydantic also refuses lone surrogates, which JSON can hold.
Text = Annotated[str, StringConstraints(max_length=8 << 20)]


class RequestModel(BaseModel):
    """A JSON object sent by a client. A field that is null counts as not sent.

    Fields are known, or in `without_effect` (accepted because clients send them and nothing depends on them),
    or in `unsupported` with a value that asks for nothing (`instead` says what to send), an empty one included unless
    the field `asks_if_empty`; any other field is refused by name unless it is empty or false. With `is_open` a field
    that nobody knows has no effect, unless it looks like a known one misspelt.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)

    without_effect: ClassVar[frozenset[str]] = frozenset()
    unsupported: ClassVar[Neutral] = {}
    asks_if_empty: ClassVar[frozenset[str]] = frozenset()
    instead: ClassVar[Mapping[str, str]] = {}
    is_open: ClassVar[bool] = False

    @model_validator(mode="before")
    @classmethod
    def _known_fields(cls, data: object) -> object:
        if not isinstance(data, dict):
            raise refusal("not_an_object", "must be a JSON object")
        known: dict[str, Any] = {}
        for name, value in data.items():
            if value is None or name in cls.without_effect:
                continue
            if name in _fields_of(cls):
                # JSON has one kind of number, and some languages write all of theirs with a point.
                known[name] = int(value) if isinstance(value, float) and value.is_integer() else value
            elif name in cls.unsupported:
                neutral = cls.unsupported[name]
                is_empty = _is_empty(value) and name not in cls.asks_if_empty
                if not (is_empty or any(_is_same(value, one) for one in neutral)):
                    allowed = f"; leave it out or send {_json_like(neutral)}" if neutral else "; leave it out"
                    allowed = f"; {cls.instead[name]}" if name in cls.instead else allowed
                    raise refusal("unsupported_field", f"not supported by this server{allowed}", name)
            elif not _asks_for_nothing(value) and not (cls.is_open and not _close_to(name, cls, 0.85)):
                raise refusal("unknown_field", _unknown_field(name, cls), printable(name)[:MAX_NAME_CHARS])
        return known


def _is_same(value: object, neutral: object) -> bool:
    """As JSON has it: 1 and 1.0 are one number, and neither of them is true."""
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)


def _asks_for_nothing(value: object) -> bool:
    return value is False or _is_empty(value)


def _is_empty(value: object) -> bool:
    return isinstance(value, str | list | dict) and not value


def _close_to(name: str, model: type[RequestModel], cutoff: float) -> list[str]:
    return difflib.get_close_matches(name[:MAX_NAME_CHARS], sorted(_fields_of(model)), n=1, cutoff=cutoff)


@functools.cache
def _fields_of(model: type[RequestModel]) -> frozenset[str]:
    """The names of a model's fields on the wire."""
    return frozenset(field.alias or name for name, field in model.model_fields.items())


def _unknown_field(name: str, model: type[RequestModel]) -> str:
    message = f"unknown field {shown(name)}"
    close = _close_to(name, model, 0.6)
    return f"{message}; did you mean {shown(close[0])}?" if close else message


def _json_like(values: tuple[object, ...]) -> str:
    return " or ".join(json.dumps(value) if isinstance(value, bool | dict) else repr(value) for value in values)


class ErrorBody(BaseModel):
    """What went wrong, for people and for programs."""

    message: str = Field(examples=["temperature: input should be less than or equal to 2"])
    type: str = Field(examples=["invalid_request_error"])
    param: str | None = Field(examples=["temperature"])
    code: str | None = Field(examples=["less_than_equal"])


class ErrorReply(BaseModel):
    """Every reply other than 2xx, and the last event of a stream that fails."""

    error: ErrorBody


ERROR_REPLIES: dict[int | str, dict[str, Any]] = {
    "4XX": {
        "model": ErrorReply,
        "description": "The request cannot be served; the message says why",
    },
    "5XX": {"model": ErrorReply, "description": "The server cannot serve the request now"},
}

# Of a route that gives nothing but events: FastAPI would take them for errors' type as well.
ERRORS_OF_STREAMS: dict[int | str, dict[str, Any]] = {
    status: {
        "description": reply["description"],
        "content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{reply['model'].__name__}"}}},
    }
    for status, reply in ERROR_REPLIES.items()
}

STREAM_REPLY: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}, "description": "Whole, or as a stream"},
}
