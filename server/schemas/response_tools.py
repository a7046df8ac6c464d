"""Tools, and which of them to call: what a request says of it in the words of OpenAI's Responses."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from softbatch.server.request_failures import shown
from softbatch.server.schemas.base import Neutral, RequestModel, Text, refusal
from softbatch.server.schemas.tools import MAX_TOOLS, FunctionsOnly, Parameters, ToolName
from softbatch.server.tools.tool import Tool, ToolUse


class ResponseTool(FunctionsOnly):
    """A function that the model may call, and the client runs."""

    is_open: ClassVar[bool] = True
    unsupported: ClassVar[Neutral] = {
        "defer_loading": (False,),
        "allowed_callers": (["direct"],),
        "output_schema": (),
    }

    name: ToolName
    description: Text = ""
    parameters: Parameters = Field(default={}, description="a JSON schema; left out: the function has no parameters")
    strict: bool = Field(default=False, description="arguments follow the schema wherever the model calls it")


class NamedFunction(RequestModel):
    """A function among the tools."""

    type: Literal["function"] = "function"
    name: ToolName


def _as_choice(value: object) -> object:
    return {"type": value} if isinstance(value, str) else value


class ResponseToolChoice(RequestModel):
    """The function that must be called, or those of which some may or must be; of 'auto', 'none' and 'required' the
    type is all there is."""

    type: Literal["auto", "none", "required", "function", "allowed_tools"]
    name: ToolName | None = None
    mode: Literal["auto", "required"] = "auto"
    tools: list[NamedFunction] = Field(default=[], max_length=MAX_TOOLS)

    @model_validator(mode="after")
    def _is_whole(self) -> ResponseToolChoice:
        if (self.type == "function") != (self.name is not None):
            raise refusal("tool_choice", "type 'function' and the name of a function go together", "name")
        if (self.type == "allowed_tools") != bool(self.tools):
            raise refusal("tool_choice", "type 'allowed_tools' goes with some of the tools", "tools")
        return self

    @property
    def names(self) -> list[str]:
        """The tools that it names."""
        return [self.name] if self.name is not None else [tool.name for tool in self.tools]


class ResponseToolFields(RequestModel):
    """The fields of a request that say what the model may call."""

    tools: Annotated[list[ResponseTool], Field(fail_fast=True, max_length=MAX_TOOLS)] = Field(
        default=[], description="functions that the model may call"
    )
    tool_choice: Annotated[
        ResponseToolChoice,
        BeforeValidator(_as_choice, json_schema_input_type=Literal["auto", "none", "required"] | ResponseToolChoice),
    ] = Field(
        default=ResponseToolChoice(type="auto"),
        description="'auto', 'none', 'required', or a function that must be called",
    )
    parallel_tool_calls: bool | None = Field(
        default=None, description="false: at most one call; left out: several only if none is required"
    )

    @property
    def tool_use(self) -> ToolUse:
        choice = self.tool_choice
        if choice.type == "none":
            return ToolUse()
        tools = tuple(
            Tool(tool.name, tool.description, tool.parameters, tool.strict, f"tools.{index}")
            for index, tool in enumerate(self.tools)
            if not choice.tools or tool.name in choice.names
        )
        must_call = choice.type == "required" or (choice.type == "allowed_tools" and choice.mode == "required")
        required = {tool.name for tool in tools if must_call or tool.name == choice.name}
        # A model that must call goes on calling if it is unsure of itself: only whoever asks for several gets them.
        parallel = self.parallel_tool_calls is not False if not required else self.parallel_tool_calls is True
        return ToolUse(tools, frozenset(required), parallel)

    @model_validator(mode="after")
    def _choice_is_among_tools(self) -> ResponseToolFields:
        names: list[Any] = [tool.name for tool in self.tools]
        for index, name in enumerate(names):
            if name in names[:index]:
                raise refusal("tools", f"two tools are named {shown(name)}", f"tools.{index}.name")
        if not names and self.tool_choice.type not in ("auto", "none"):
            raise refusal("tool_choice", "needs 'tools' to choose from", "tool_choice")
        for name in self.tool_choice.names:
            if name not in names:
                raise refusal("tool_choice", f"there is no tool {shown(name)} among the tools", "tool_choice")
        return self
