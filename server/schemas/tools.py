"""Tools, which of them to call, and calls: what a request says of them in OpenAI's words."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import msgspec
from pydantic import BeforeValidator, Field, StringConstraints, model_validator

from softbatch.server.request_failures import shown
from softbatch.server.schemas.base import RequestModel, Text, refusal
from softbatch.server.schemas.structured import MAX_GRAMMAR_CHARS
from softbatch.server.tools.tool import Tool, ToolUse

MAX_TOOLS = 256
MAX_CALLS = 256
MAX_DEPTH = 64

Identifier = Annotated[str, StringConstraints(max_length=256)]
ToolName = Annotated[str, StringConstraints(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9_.\-]+$")]


def _as_parameters(value: object) -> object:
    if not isinstance(value, dict):
        raise refusal("json_schema", "must be a JSON schema: an object such as {'type': 'object', 'properties': {}}")
    if value.get("type", "object") != "object":
        raise refusal("json_schema", "must be a JSON schema of type 'object': arguments have names", "type")
    if not isinstance(value.get("properties", {}), dict):
        raise refusal("json_schema", "must be an object: the schema of each parameter by its name", "properties")
    return as_bounded(value)


def as_bounded(value: object) -> object:
    """JSON that is neither deep nor long, and has no lone surrogates."""
    try:
        text = msgspec.json.encode(value)
    except (RecursionError, UnicodeEncodeError):
        text = b""
    if not text or _depth(value) > MAX_DEPTH:
        raise refusal("json", f"is nested deeper than {MAX_DEPTH} levels, or not valid Unicode")
    if len(text) > MAX_GRAMMAR_CHARS:
        raise refusal("too_long", f"at most {MAX_GRAMMAR_CHARS} characters are allowed, not {len(text)}")
    return value


def _depth(value: object) -> int:
    """Levels of objects and arrays, counted without recursion."""
    depth, level = 0, [value]
    while level and depth <= MAX_DEPTH:
        inner = [list(one.values()) if isinstance(one, dict) else one for one in level if isinstance(one, dict | list)]
        level = [item for items in inner for item in items]
        depth += bool(inner)
    return depth


Parameters = Annotated[dict[str, Any], BeforeValidator(_as_parameters)]


class FunctionDefinition(RequestModel):
    """What a model is told of a function."""

    without_effect: ClassVar[frozenset[str]] = frozenset({"cache_control"})

    name: ToolName
    description: Text = ""
    parameters: Parameters = Field(default={}, description="a JSON schema; left out: the function has no parameters")
    strict: bool = Field(default=False, description="arguments follow the schema wherever the model calls it")


class FunctionsOnly(RequestModel):
    """A tool, if it is a function; of other types the type is named."""

    type: Literal["function"]

    @model_validator(mode="before")
    @classmethod
    def _is_function(cls, data: object) -> object:
        kind = data.get("type") if isinstance(data, dict) else None
        if isinstance(kind, str) and kind != "function":
            message = f"tools of type {shown(kind)} are not supported, only 'function'"
            raise refusal("unsupported_tool", message, "type")
        return data


class ToolDefinition(FunctionsOnly):
    """A function that the model may call. Where a prefix is to be cached need not be said: the cache finds it."""

    without_effect: ClassVar[frozenset[str]] = frozenset({"cache_control"})

    type: Literal["function"] = "function"
    function: FunctionDefinition


class FunctionName(RequestModel):
    """The name of a function among the tools."""

    name: ToolName


class NamedTool(RequestModel):
    """A tool by its name."""

    type: Literal["function"]
    function: FunctionName


class AllowedTools(RequestModel):
    """Some of the tools, and whether one of them must be called."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1, max_length=MAX_TOOLS)]


def _as_choice(value: object) -> object:
    """Mistral's word for what must be called is 'any'."""
    return {"type": "required" if value == "any" else value} if isinstance(value, str) else value


class ToolChoice(RequestModel):
    """The function that must be called, or those of which some may be; of 'auto', 'none' and 'required' the type is
    all there is."""

    type: Literal["auto", "none", "required", "function", "allowed_tools"] = "function"
    function: FunctionName | None = None
    allowed_tools: AllowedTools | None = None

    @model_validator(mode="after")
    def _is_whole(self) -> ToolChoice:
        if (self.function is None) == (self.type == "function"):
            raise refusal("tool_choice", "type 'function' and the name of a function go together", "function")
        if (self.allowed_tools is None) == (self.type == "allowed_tools"):
            raise refusal("tool_choice", "type 'allowed_tools' goes with a mode and some of the tools", "allowed_tools")
        return self

    @property
    def must_call(self) -> bool:
        return self.type == "required" or (self.allowed_tools is not None and self.allowed_tools.mode == "required")

    @property
    def names(self) -> list[str]:
        """The tools that it names."""
        named = [self.function] if self.function else []
        return [one.name for one in (*named, *(tool.function for tool in self.allowed))]

    @property
    def allowed(self) -> list[NamedTool]:
        return self.allowed_tools.tools if self.allowed_tools is not None else []


Choice = Annotated[
    ToolChoice,
    BeforeValidator(_as_choice, json_schema_input_type=Literal["auto", "none", "required"] | ToolChoice),
]


def _as_text(value: object) -> object:
    """Some clients send back the object instead of its text."""
    if not isinstance(value, dict):
        return value
    try:
        return msgspec.json.encode(value).decode()
    except (RecursionError, UnicodeEncodeError):
        raise refusal("json_schema", "is nested too deeply, or not valid Unicode") from None


class CalledFunction(RequestModel):
    """A call as the model made it; `arguments` is JSON text."""

    is_open: ClassVar[bool] = True

    name: Annotated[str, StringConstraints(min_length=1, max_length=256)]
    arguments: Annotated[Text, BeforeValidator(_as_text, json_schema_input_type=str)] = ""


class CallMade(RequestModel):
    """A call in an assistant's earlier turn."""

    is_open: ClassVar[bool] = True
    without_effect: ClassVar[frozenset[str]] = frozenset({"index"})

    id: Identifier = ""
    type: Literal["function"] = "function"
    function: CalledFunction

    def as_call(self) -> dict[str, Any]:
        function = {"name": self.function.name, "arguments": self.function.arguments}
        return {"id": self.id, "type": "function", "function": function}


class ToolFields(RequestModel):
    """The fields of a request that say what the model may call."""

    tools: Annotated[list[ToolDefinition], Field(fail_fast=True, max_length=MAX_TOOLS)] = Field(
        default=[], description="functions that the model may call"
    )
    tool_choice: Choice | None = Field(
        default=None, description="'auto', 'none', 'required', or a function that must be called"
    )
    parallel_tool_calls: bool | None = Field(
        default=None, description="false: at most one call; left out: several only if none is required"
    )

    @property
    def tool_use(self) -> ToolUse:
        tools = tuple(
            Tool(
                tool.function.name,
                tool.function.description,
                tool.function.parameters,
                tool.function.strict,
                f"tools.{index}.function",
            )
            for index, tool in enumerate(self.tools)
        )
        choice = self.tool_choice
        if choice is None or not tools:
            return ToolUse(tools, parallel=self.parallel_tool_calls is not False)
        if choice.type == "none":
            return ToolUse()
        if choice.allowed:
            tools = tuple(tool for tool in tools if tool.name in choice.names)
        required = {tool.name for tool in tools if choice.must_call or (choice.function and tool.name in choice.names)}
        # A model that must call goes on calling if it is unsure of itself: only whoever asks for several gets them.
        parallel = self.parallel_tool_calls is not False if not required else self.parallel_tool_calls is True
        return ToolUse(tools, frozenset(required), parallel)

    @model_validator(mode="after")
    def _choice_is_among_tools(self) -> ToolFields:
        names = [tool.function.name for tool in self.tools]
        for index, name in enumerate(names):
            if name in names[:index]:
                raise refusal("tools", f"two tools are named {shown(name)}", f"tools.{index}.function.name")
        if self.tool_choice is None:
            return self
        if not names and self.tool_choice.type not in ("auto", "none"):
            raise refusal("tool_choice", "needs 'tools' to choose from", "tool_choice")
        for name in self.tool_choice.names:
            if name not in names:
                raise refusal("tool_choice", f"there is no tool {shown(name)} among the tools", "tool_choice")
        return self
