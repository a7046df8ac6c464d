"""Turns of APIs whose clients may split one turn into several."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any


def joined_turns(turns: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Turns for a chat template, those of one speaker that follow each other made one. Each result of a tool stays a
    turn of its own."""
    speakers: list[list[Mapping[str, Any]]] = []
    for turn in turns:
        if speakers and speakers[-1][-1]["role"] == turn["role"] != "tool":
            speakers[-1].append(turn)
        else:
            speakers.append([turn])
    return [_one_of(parts) for parts in speakers]


def _one_of(parts: list[Mapping[str, Any]]) -> dict[str, Any]:
    """All pieces are joined at once: there may be thousands."""
    if len(parts) == 1:
        return dict(parts[0])
    one = dict(parts[0]) | {"content": "\n".join(part["content"] for part in parts if part["content"])}
    for name in ("reasoning", "reasoning_content"):
        if pieces := [part[name] for part in parts if name in part]:
            one[name] = "".join(pieces)
    if calls := [part["tool_calls"] for part in parts if "tool_calls" in part]:
        one["tool_calls"] = list(chain.from_iterable(calls))
    return one


def call_of(call_id: str, name: str, arguments: str) -> dict[str, Any]:
    """A call of a tool, as a turn has it."""
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
