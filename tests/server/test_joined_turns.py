"""Turns that clients split: joined as one turn, of any number of pieces, in time that grows as they do."""

from __future__ import annotations

import time
from typing import Any

import pytest
from pydantic import ValidationError

from softbatch.server.schemas.joined_turns import call_of, joined_turns
from softbatch.server.schemas.messages import MAX_BLOCKS, CountTokensRequest
from softbatch.server.schemas.tools import MAX_CALLS
from softbatch.server.tools.tool_prompt import _merged, _one_by_one


def said(role: str, text: object, **fields: Any) -> dict[str, Any]:
    return {"role": role, "content": text, **fields}


def result(number: int) -> dict[str, Any]:
    return said("tool", str(number), tool_call_id=str(number))


def test_pieces_of_one_speaker_are_one_turn_and_results_are_not() -> None:
    turns = [
        said("user", "a"),
        said("user", ""),
        said("user", "b"),
        said("assistant", "", reasoning="x"),
        said("assistant", "c", reasoning="y", tool_calls=[call_of("0", "f", "{}")]),
        said("assistant", "", tool_calls=[call_of("1", "f", "{}")]),
        result(0),
        result(1),
    ]
    calls = [call_of("0", "f", "{}"), call_of("1", "f", "{}")]
    answer = said("assistant", "c", reasoning="xy", tool_calls=calls)
    assert joined_turns(turns) == [said("user", "a\nb"), answer, result(0), result(1)]
    assert len(turns[4]["tool_calls"]) == 1, "what came in stays as it was"


def test_thousands_of_pieces_take_no_longer_than_their_text() -> None:
    turns = [said("user", "a" * 100)] * 30_000
    calls = said("assistant", "", tool_calls=[call_of(str(i), "f", "{}") for i in range(8000)])
    results = [result(i) for i in range(8000)]
    words = [said("user", "<tool_response>\n" + "a" * 100 + "\n</tool_response>")] * 30_000
    begun = time.thread_time()  # others on this machine count for nothing
    assert len(joined_turns(turns)) == 1
    assert len(_one_by_one([calls, *results])) == 16_000
    assert len(_merged(words)) == 1
    assert time.thread_time() - begun < 2


def test_a_conversation_has_no_more_blocks_than_are_bearable() -> None:
    turn = said("user", [{"type": "text", "text": "a"}] * 64)
    CountTokensRequest.model_validate({"messages": [turn] * (MAX_BLOCKS // 64)})
    with pytest.raises(ValidationError, match=f"at most {MAX_BLOCKS} blocks in all turns"):
        CountTokensRequest.model_validate({"messages": [turn] * (MAX_BLOCKS // 64 + 1)})


def test_calls_in_turns_that_follow_each_other_are_those_of_one_turn() -> None:
    call = {"type": "tool_use", "id": "a", "name": "f", "input": {}}
    turns = [said("assistant", [call] * 64)] * (MAX_CALLS // 64)
    CountTokensRequest.model_validate({"messages": [*turns, said("user", "x"), turns[0], said("user", "x")]})
    with pytest.raises(ValidationError, match=f"at most {MAX_CALLS} calls"):
        CountTokensRequest.model_validate({"messages": [*turns, turns[0], said("user", "x")]})
