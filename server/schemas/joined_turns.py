"""Turns of APIs whose clients may split one turn into several."""

from __future__ import annotations

from collections.abc import Iterable


def joined_turns(parts: Iterable[tuple[str, str]]) -> list[dict[str, str]]:
    """(role, text) of each part as turns for a chat template: those of one speaker that follow each other are one."""
    turns: list[dict[str, str]] = []
    for role, text in parts:
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] += "\n" + text
        else:
            turns.append({"role": role, "content": text})
    return turns
