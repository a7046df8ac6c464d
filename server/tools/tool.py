"""A tool that a client offers, and which of them the model may or must call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Tool:
    """A function. `parameters` is a JSON schema; `param` names that field of the request, for messages. With `strict`
    the arguments of a call follow the schema wherever the model makes one."""

    name: str
    description: str = ""
    parameters: dict[str, Any] = field(default_factory=dict)
    strict: bool = False
    param: str = "tools"

    def as_json(self) -> dict[str, Any]:
        """As chat templates want it."""
        parameters = self.parameters or {"type": "object", "properties": {}}
        function = {"name": self.name, "description": self.description, "parameters": parameters}
        return {"type": "function", "function": function}


@dataclass(frozen=True)
class ToolUse:
    """The tools that the model is told of. With `required`, the names of some, the output is calls of them and nothing
    else; without `parallel` it has at most one. No tools: none are called, whatever the output says."""

    tools: Sequence[Tool] = ()
    required: frozenset[str] = frozenset()
    parallel: bool = True

    @property
    def signatures(self) -> dict[str, dict[str, Any]]:
        """The names of the tools, with their parameters and what is said of these, definitions included."""
        return {tool.name: _properties(tool) for tool in self.tools}


def _properties(tool: Tool) -> dict[str, Any]:
    properties = tool.parameters.get("properties")
    if not isinstance(properties, dict):
        return {}
    definitions = {word: tool.parameters[word] for word in ("$defs", "definitions") if word in tool.parameters}
    return {key: one | definitions if isinstance(one, dict) else one for key, one in properties.items()}
