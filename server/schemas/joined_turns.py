"""Turns of APIs whose clients may split one turn into several."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def joined_turns(turns: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Turns for a chat template, those of one speaker that follow each other made one. Each result of a tool stays a
    turn of its own."""
    joined: list[dict[str, Any]] = []
    for turn in turns:
        if not joined or joined[-1]["role"] != turn["role"] or turn["role"] == "tool":
            joined.append(dict(turn))
            continue
        last = joined[-1]
        last["content"] = "\n".join(text for text in (last["content"], turn["content"]) if text)
        for name in ("tool_calls", "reasoning", "reasoning_content"):
            if name in turn:
                last[name] = last[name] + turn[name] if name in last else turn[name]
    return joined


def call_of(call_id: str, name: str, arguments: str) -> dict[str, Any]:
    """A call of a tool, as a turn has it."""
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
