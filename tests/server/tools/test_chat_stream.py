"""A chat's stream of scripted outputs: as OpenAI's own package puts it together again."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types.chat import ChatCompletionChunk

from softbatch.server.http.sse import DONE
from softbatch.server.requests.generation import Delta
from softbatch.server.requests.recall import Recalled
from softbatch.server.routes.chat_stream import ChatStream
from softbatch.server.schemas.chat import ChatCompletionRequest
from softbatch.server.tools.call_formats import CALL_FORMATS
from softbatch.server.tools.dialect import REASONING_FORMATS
from softbatch.server.tools.message_reader import MessageReader

REPLY = {"id": "chatcmpl-1", "created": 1, "model": "m"}
BODY: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}], "stream": True}


class ScriptedOutput:
    """Yields its pieces as deltas; the last of them ends the output."""

    prompt_ids: tuple[int, ...] = ()
    recalled = Recalled()

    def __init__(self, pieces: list[str], reason: str = "eos") -> None:
        self._pieces = pieces
        self._reason = reason

    async def __aiter__(self) -> AsyncIterator[Delta]:
        for number, piece in enumerate(self._pieces, 1):
            yield Delta(piece, (), self._reason if number == len(self._pieces) else None)  # type: ignore[arg-type]

    def cancel(self) -> None: ...


def chunks_of(text: str, size: int, reason: str = "eos") -> list[dict[str, Any]]:
    def reader(prompt_ids: object) -> MessageReader:
        return MessageReader(CALL_FORMATS["hermes"], REASONING_FORMATS["think"], {"f": ()})

    pieces = [text[at : at + size] for at in range(0, len(text), size)]
    plan: Any = SimpleNamespace(reads=True, reader=reader)
    outputs: Any = [ScriptedOutput(pieces, reason)]
    stream = ChatStream(ChatCompletionRequest.model_validate(BODY), plan, outputs, REPLY)

    async def run() -> list[Any]:
        return [event async for event in stream.events()]

    *events, done = asyncio.run(run())
    assert done == DONE
    return [json.loads(event) for event in events]


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_reasoning_text_and_calls_are_put_together_again(size: int) -> None:
    call = '<tool_call>\n{"name": "f", "arguments": {"a": "b"}}\n</tool_call>'
    state = ChatCompletionStreamState()
    reasoning = ""
    for chunk in chunks_of(f"<think>\nHm, so.\n</think>\n\nLet me see.\n{call}\n{call}", size):
        state.handle_chunk(ChatCompletionChunk.model_validate(chunk))
        delta = chunk["choices"][0]["delta"]
        assert delta.get("reasoning") == delta.get("reasoning_content")
        reasoning += delta.get("reasoning_content", "")
    (choice,) = state.get_final_completion().choices
    assert reasoning == "Hm, so."
    assert choice.message.content == "Let me see."
    calls = choice.message.tool_calls or []
    assert [(one.function.name, one.function.arguments) for one in calls] == [("f", '{"a": "b"}')] * 2
    assert choice.finish_reason == "tool_calls"


def test_text_alone_looks_as_ever() -> None:
    chunks = [chunk["choices"][0] for chunk in chunks_of("One two three", 4)]
    assert [chunk["delta"] for chunk in chunks[:2]] == [{"role": "assistant", "content": ""}, {"content": "One"}]
    assert chunks[-1]["finish_reason"] == "stop"
    assert "".join(chunk["delta"].get("content", "") for chunk in chunks) == "One two three"


def test_a_call_that_is_cut_off_ends_for_its_length() -> None:
    chunks = chunks_of('<tool_call>{"name": "f", "arguments": {"a": "b', 5, "length")
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    parts = [call for chunk in chunks for call in chunk["choices"][0]["delta"].get("tool_calls", ())]
    assert "".join(part["function"]["arguments"] for part in parts) == '{"a": "b'
