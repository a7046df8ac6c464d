"""Tools, which of them to call, and how much to think: what a request says of it in Anthropic's words."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from softbatch.server.request_failures import shown
from softbatch.server.schemas.base import MAX_INT32, Neutral, RequestModel, Text, refusal
from softbatch.server.schemas.tools import MAX_TOOLS, Parameters, ToolName
from softbatch.server.tools.tool import Tool, ToolUse


class MessageTool(RequestModel):
    """A function that the model may call, and the client runs."""

    is_open: ClassVar[bool] = True
    without_effect: ClassVar[frozenset[str]] = frozenset({"cache_control", "eager_input_streaming"})
    unsupported: ClassVar[Neutral] = {
        "input_examples": ([],),
        "defer_loading": (False,),
        "allowed_callers": (["direct"],),
    }

    type: Literal["custom"] = "custom"
    name: ToolName
    description: Text = ""
    input_schema: Parameters
    strict: bool = Field(default=False, description="inputs follow the schema wherever the model calls it")

    @model_validator(mode="before")
    @classmethod
    def _is_the_clients(cls, data: object) -> object:
        kind = data.get("type") if isinstance(data, dict) else None
        if isinstance(kind, str) and kind != "custom":
            message = f"tools of type {shown(kind)} are not supported, only those that the client runs"
            raise refusal("unsupported_tool", message, "type")
        return data


class MessageToolChoice(RequestModel):
    """Whether a tool may be called, must be, or which one must be."""

    type: Literal["auto", "any", "tool", "none"]
    name: ToolName | None = None
    disable_parallel_tool_use: bool | None = Field(
        default=None, description="true: at most one call; left out: several only if none must be made"
    )

    @model_validator(mode="after")
    def _is_whole(self) -> MessageToolChoice:
        if (self.type == "tool") != (self.name is not None):
            raise refusal("tool_choice", "type 'tool' and the name of a tool go together", "name")
        return self


class ThinkingConfig(RequestModel):
    """Whether a model that can think before it answers does so."""

    without_effect: ClassVar[frozenset[str]] = frozenset({"display"})

    type: Literal["disabled", "enabled", "adaptive"]
    budget_tokens: int | None = Field(
        default=None, ge=1, le=MAX_INT32, description="how long it thinks is up to the model; max_tokens bounds all"
    )


class MessageToolFields(RequestModel):
    """The fields of a request that say what the model may call and how it is to think."""

    tools: Annotated[list[MessageTool], Field(fail_fast=True, max_length=MAX_TOOLS)] = Field(
        default=[], description="functions that the model may call"
    )
    tool_choice: MessageToolChoice | None = None
    thinking: ThinkingConfig | None = Field(
        default=None, description="'enabled' if the model's chat template can be told so; else as the model does it"
    )

    @property
    def tool_use(self) -> ToolUse:
        tools = tuple(
            Tool(tool.name, tool.description, tool.input_schema, tool.strict, f"tools.{index}")
            for index, tool in enumerate(self.tools)
        )
        choice = self.tool_choice
        if choice is None:
            return ToolUse(tools)
        if choice.type == "none":
            return ToolUse()
        required = {tool.name for tool in tools if choice.type == "any" or tool.name == choice.name}
        # A model that must call goes on calling if it is unsure of itself: only whoever asks for several gets them.
        wanted = choice.disable_parallel_tool_use
        return ToolUse(tools, frozenset(required), wanted is False if required else wanted is not True)

    @property
    def thinking_effort(self) -> str | None:
        """In OpenAI's words; None: as the model does it."""
        kind = self.thinking.type if self.thinking is not None else "adaptive"
        return {"disabled": "none", "enabled": "medium", "adaptive": None}[kind]

    @model_validator(mode="after")
    def _choice_is_among_tools(self) -> MessageToolFields:
        names: list[Any] = [tool.name for tool in self.tools]
        for index, name in enumerate(names):
            if name in names[:index]:
                raise refusal("tools", f"two tools are named {shown(name)}", f"tools.{index}.name")
        choice = self.tool_choice
        if choice is None:
            return self
        if not names and choice.type in ("any", "tool"):
            raise refusal("tool_choice", "needs 'tools' to choose from", "tool_choice")
        if choice.name is not None and choice.name not in names:
            raise refusal("tool_choice", f"there is no tool {shown(choice.name)} among the tools", "tool_choice.name")
        return self
