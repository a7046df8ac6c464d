"""Streams of scripted outputs in Anthropic's and OpenAI's newer events: thoughts, text and calls, each in its place."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from anthropic.types import RawMessageStreamEvent
from openai.types.responses import ResponseStreamEvent
from pydantic import TypeAdapter

from softbatch.server.requests.choices import Choice
from softbatch.server.requests.generation import Delta, Token
from softbatch.server.requests.recall import Recalled
from softbatch.server.routes.message_stream import PING, MessageStream, whole_message
from softbatch.server.routes.response_stream import ResponseStream, whole_response
from softbatch.server.schemas.messages import MessagesRequest
from softbatch.server.schemas.responses import ResponsesRequest
from softbatch.server.tools.call_formats import CALL_FORMATS
from softbatch.server.tools.dialect import REASONING_FORMATS
from softbatch.server.tools.message_reader import MessageReader

CALL = '<tool_call>\n{"name": "f", "arguments": {"a": "b"}}\n</tool_call>'
TEXT = f"<think>\nHm, so.\n</think>\n\nLet me see.\n{CALL}\n{CALL}"
OUTPUTS = [
    (TEXT, "eos"),
    ("Only a text.", "length"),
    ("", "eos"),
    (CALL, "stop"),
    (CALL[:-30], "length"),
    (f"{CALL}\nBoth, I think.\n{CALL}\nThat is all.", "eos"),
]
ARGUMENTS = '{"a": "b"}'
MESSAGES = MessagesRequest.model_validate({"messages": [{"role": "user", "content": "x"}], "max_tokens": 9})
RESPONSES = ResponsesRequest.model_validate({"input": "x"})
# Where a second block of a kind begins a new one, and what is not of the API is an error.
OF_ANTHROPIC: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)
OF_OPENAI: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


class ScriptedGeneration:
    """Yields its pieces as deltas; the last of them ends the output."""

    request_id, created, ended_at, prompt_ids = "r", 1, 2, ()
    prompt_tokens, virtual_tokens, cached_tokens, completion_tokens = 12, 4, 7, 9
    recalled = Recalled()

    def __init__(self, text: str, size: int, reason: str) -> None:
        self._pieces = [text[at : at + size] for at in range(0, len(text), size)] or [""]
        self._reason: Any = reason

    async def __aiter__(self) -> AsyncIterator[Delta]:
        for number, piece in enumerate(self._pieces, 1):
            yield Delta(piece, (), self._reason if number == len(self._pieces) else None)


def plan() -> Any:
    def reader(prompt_ids: object) -> MessageReader:
        return MessageReader(CALL_FORMATS["hermes"], REASONING_FORMATS["think"], {"f": ()})

    return SimpleNamespace(reads=True, reader=reader)


def events_of(kind: Any, body: Any, text: str, size: int, reason: str) -> Iterator[dict[str, Any]]:
    generation: Any = ScriptedGeneration(text, size, reason)

    async def run() -> list[Any]:
        return [event async for event in kind(body, plan(), "m", generation).events()]

    for event in asyncio.run(run()):
        if event != PING:
            parsed = json.loads(event)
            (OF_ANTHROPIC if kind is MessageStream else OF_OPENAI).validate_python(parsed)
            yield parsed


def choice_of(text: str, reason: Any) -> Choice:
    generation: Any = ScriptedGeneration(text, 1, reason)
    return Choice(generation, [text], [], reason, None)


def without_ids(value: Any) -> Any:
    """What differs between two readings of one text is made the same."""
    if isinstance(value, dict):
        return {k: without_ids(v) for k, v in value.items() if k not in ("id", "call_id", "completed_at")}
    return [without_ids(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize("size", [1, 7, 1000])
@pytest.mark.parametrize(("text", "reason"), OUTPUTS)
def test_a_message_in_pieces_is_the_whole_one(text: str, reason: str, size: int) -> None:
    start, *events, end, stop = events_of(MessageStream, MESSAGES, text, size, reason)
    assert (start["type"], end["type"], stop) == ("message_start", "message_delta", {"type": "message_stop"})
    blocks: list[dict[str, Any]] = []
    for event in events:
        assert event["index"] == len(blocks) - (event["type"] != "content_block_start")
        if event["type"] == "content_block_start":
            blocks.append(event["content_block"] | {"json": ""})
        elif event["type"] == "content_block_delta":
            delta = event["delta"]
            name = {"text_delta": "text", "thinking_delta": "thinking", "input_json_delta": "json"}[delta["type"]]
            blocks[-1][name] += delta["partial_json" if name == "json" else name]
    for block in blocks:
        written = block.pop("json")
        if block["type"] == "tool_use" and reason != "length":
            block["input"] = json.loads(written)
    whole = whole_message(MESSAGES, plan(), "m", choice_of(text, reason)).model_dump()
    assert without_ids(blocks) == without_ids(whole["content"])
    assert (end["delta"]["stop_reason"], end["usage"]) == (whole["stop_reason"], whole["usage"])
    assert (whole["usage"]["input_tokens"], whole["usage"]["cache_read_input_tokens"]) == (9, 7)


def test_a_whole_message() -> None:
    whole = whole_message(MESSAGES, plan(), "m", choice_of(TEXT, "eos"))
    assert [block.type for block in whole.content] == ["thinking", "text", "tool_use", "tool_use"]
    assert [block.input for block in whole.content[2:]] == [{"a": "b"}] * 2
    assert whole.stop_reason == "tool_use"


@pytest.mark.parametrize("size", [1, 7, 1000])
@pytest.mark.parametrize(("text", "reason"), OUTPUTS)
def test_a_response_in_pieces_is_the_whole_one(text: str, reason: str, size: int) -> None:
    events = list(events_of(ResponseStream, RESPONSES, text, size, reason))
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    items: list[dict[str, Any]] = []
    written: dict[str, str] = {}
    for event in events[2:-1]:
        assert event["output_index"] == len(items)
        kind = event["type"].removeprefix("response.")
        if kind.endswith(".delta"):
            written[event["item_id"]] = written.get(event["item_id"], "") + event["delta"]
        elif kind in ("output_text.done", "reasoning_text.done", "function_call_arguments.done"):
            assert written.get(event["item_id"], "") == event.get("text", event.get("arguments"))
        elif kind == "output_item.done":
            items.append(event["item"])
    last = events[-1]["response"]
    assert last["output"] == items
    assert events[-1]["type"] == f"response.{last['status']}"
    whole = whole_response(RESPONSES, plan(), "m", choice_of(text, reason)).model_dump()
    assert without_ids(last) == without_ids(whole)


def test_a_whole_response() -> None:
    whole = whole_response(RESPONSES, plan(), "m", choice_of(TEXT, "eos"))
    assert [item.type for item in whole.output] == ["reasoning", "message", "function_call", "function_call"]
    assert [item.arguments for item in whole.output[2:]] == [ARGUMENTS] * 2
    assert len({item.id for item in whole.output}) == 4
    assert whole.status == "completed"


@pytest.mark.parametrize("size", [1, 5, 1000])
def test_log_probabilities_are_those_of_the_answer_alone(size: int) -> None:
    """However many tokens come at once."""
    body = ResponsesRequest.model_validate({"input": "x", "include": ["message.output_text.logprobs"]})
    words = ["<think>", "\nHm", ", so.", "\n", "</think>", "\n\n", "Let", " me", " s\u00e9", "e."]
    tokens = tuple(Token(number, word, False, word.encode(), -1.0) for number, word in enumerate(words))
    generation: Any = ScriptedGeneration("", 1, "eos")
    stream = ResponseStream(body, plan(), "m", generation)
    told = []
    for at in range(0, len(tokens), size):
        some = tokens[at : at + size]
        reason: Any = "eos" if at + size >= len(tokens) else None
        for event in stream.events_of(Delta("".join(token.text for token in some), some, reason)):
            if event.model_dump()["type"] == "response.output_text.delta":
                told += event.model_dump()["logprobs"]
    (content,) = stream.reply.model_dump()["output"][1]["content"]
    assert [one["token"] for one in told] == words[6:]
    assert content["logprobs"] == told
