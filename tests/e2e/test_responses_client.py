"""`/v1/responses` through the official client: texts, streams, structured output, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI
from pydantic import BaseModel

from softbatch.prompt_store.manifest import ModelSpec
from tests.support.models import Reference, make_soft_prompt, save_prompt
from tests.support.openai_requests import MESSAGES, chat_ids, client_of, greedy_text
from tests.support.servers import Server, error_of

SYSTEM, QUESTION = MESSAGES[0]["content"], MESSAGES[1]["content"][0]["text"]


@pytest.fixture(scope="module")
def client(tiny_server: Server) -> Iterator[OpenAI]:
    with client_of(tiny_server) as client:
        yield client


ASK: Any = {"model": "tiny-llama", "instructions": SYSTEM, "input": QUESTION, "temperature": 0}


def test_a_response(client: OpenAI, tiny_llama: Reference) -> None:
    reply = client.responses.create(max_output_tokens=20, store=True, metadata={"a": "b"}, **ASK)
    ids = chat_ids(tiny_llama)
    assert reply.output_text == greedy_text(tiny_llama, ids, 20)
    assert (reply.object, reply.model, reply.id[:5]) == ("response", "tiny-llama", "resp_")
    assert reply.status == "incomplete"
    assert reply.incomplete_details is not None
    assert reply.incomplete_details.reason == "max_output_tokens"
    assert (reply.instructions, reply.metadata, reply.max_output_tokens) == (SYSTEM, {"a": "b"}, 20)
    assert reply.usage is not None
    assert (reply.usage.input_tokens, reply.usage.output_tokens) == (len(ids), 20)
    assert reply.usage.total_tokens == len(ids) + 20


def test_input_as_items(client: OpenAI, tiny_llama: Reference) -> None:
    """Every way to write the same turns, and an earlier output sent back as it came."""
    first = client.responses.create(max_output_tokens=6, **ASK)
    items: Any = [
        {"role": "developer", "content": SYSTEM},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": QUESTION}]},
    ]
    again = client.responses.create(model="tiny-llama", input=items, temperature=0, max_output_tokens=6)
    assert again.output_text == first.output_text
    earlier: Any = [item.model_dump() for item in first.output]
    last: Any = {"role": "user", "content": "And then?"}
    reply = client.responses.create(
        model="tiny-llama", input=[*items, *earlier, last], temperature=0, max_output_tokens=6
    )
    turns = [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": first.output_text},
        last,
    ]
    assert reply.output_text == greedy_text(tiny_llama, ids_of(tiny_llama, turns), 6)
    # What ends with an assistant's turn gets another one, as in chats.
    reply = client.responses.create(model="tiny-llama", input=[*items, *earlier], temperature=0, max_output_tokens=6)
    assert reply.output_text == greedy_text(tiny_llama, ids_of(tiny_llama, turns[:-1]), 6)


def ids_of(tiny_llama: Reference, turns: list[dict[str, Any]]) -> list[int]:
    text = tiny_llama.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    return list(tiny_llama.tokenizer(text, add_special_tokens=False)["input_ids"])


def test_a_stream(client: OpenAI, tiny_llama: Reference) -> None:
    """OpenAI's events in their order, numbered from 0, and the helper's final response."""
    expected = greedy_text(tiny_llama, chat_ids(tiny_llama), 40)
    events: list[Any] = list(client.responses.create(stream=True, max_output_tokens=40, **ASK))
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    assert len(deltas) > 1
    assert "".join(event.delta for event in deltas) == expected
    assert [event.type.removeprefix("response.") for event in events] == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        *["output_text.delta"] * len(deltas),
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "incomplete",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[-1].response.output_text == events[-4].text == expected
    assert {event.item_id for event in events[3:-2]} == {events[-1].response.output[0].id}
    with client.responses.stream(max_output_tokens=40, **ASK) as stream:
        texts = [event.delta for event in stream if event.type == "response.output_text.delta"]
    assert "".join(texts) == expected


def test_logprobs(client: OpenAI) -> None:
    """Of all tokens, whole or in a stream; their bytes are the text's."""
    fields: Any = {"include": ["message.output_text.logprobs"], "top_logprobs": 2, "max_output_tokens": 8}
    (item,) = client.responses.create(**fields, **ASK).output
    (part,) = item.content
    assert len(part.logprobs) == 8
    assert b"".join(bytes(one.bytes) for one in part.logprobs).decode() == part.text
    assert all(len(one.top_logprobs) == 2 for one in part.logprobs)
    events: list[Any] = list(client.responses.create(stream=True, **fields, **ASK))
    streamed = [one for event in events if event.type == "response.output_text.delta" for one in event.logprobs]
    assert [one.token for one in streamed] == [one.token for one in part.logprobs]


def test_structured_output(client: OpenAI) -> None:
    class Town(BaseModel):
        name: bool
        is_old: bool

    reply = client.responses.parse(text_format=Town, max_output_tokens=300, **ASK | {"temperature": 1})
    assert reply.status == "completed"
    assert isinstance(reply.output_parsed, Town)
    choice = {"format": {"type": "json_object"}}
    reply = client.responses.create(text=choice, max_output_tokens=6, **ASK)
    assert reply.output_text.lstrip().startswith("{")


def test_a_soft_prompt_is_a_model(tiny_server: Server, client: OpenAI, tiny_spec: ModelSpec, tmp_path: Path) -> None:
    prompt = make_soft_prompt("kv", 9, tiny_spec, scale=0.5, replaces="system")
    assert tiny_server.upload("responses-manual", save_prompt(prompt, tmp_path, "p")).status_code == 201
    ask: Any = {"input": QUESTION, "temperature": 0, "max_output_tokens": 8}
    by_model = client.responses.create(model="responses-manual", **ask)
    by_field = client.responses.create(model="tiny-llama", extra_body={"soft_prompt": "responses-manual"}, **ask)
    assert by_model.output_text == by_field.output_text
    assert by_model.usage is not None
    assert by_model.usage.input_tokens_details.cached_tokens >= 9
    assert tiny_server.http.delete("/v1/soft_prompts/responses-manual").status_code == 200


def test_nothing_is_kept(client: OpenAI) -> None:
    first = client.responses.create(max_output_tokens=2, **ASK)
    with pytest.raises(openai.NotFoundError, match="keeps none") as found:
        client.responses.create(previous_response_id=first.id, max_output_tokens=2, **ASK)
    assert found.value.code == "previous_response_not_found"
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first.id)


def test_an_error_in_a_stream_is_raised(client: OpenAI) -> None:
    with pytest.raises(openai.APIError, match="within its time"):
        list(client.responses.create(stream=True, max_output_tokens=400, extra_body={"timeout_ms": 1}, **ASK))


IMAGE = {"type": "input_image", "image_url": "https://example.com/a.png"}
USER = {"role": "user", "content": "a"}


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": [{"role": "user", "content": [IMAGE]}]}, "input.0.content.0.type"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input.0.type"),
        ({"input": "word " * 600}, "input"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_output_tokens": 10_000}, "max_output_tokens"),
        ({"model": "no-such-model"}, "model"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt"),
        ({"reasoning": {"effort": "high"}}, "reasoning.effort"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "text.format.schema"),
        (
            {"text": {"format": {"type": "json_schema", "name": "a", "schema": {"not": {}}}}},
            "text.format.schema",
        ),
        ({"include": ["everything"]}, "include.0"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"max_tokens": 4}, "max_tokens"),
    ],
)
def test_what_cannot_be_answered(tiny_server: Server, change: dict[str, Any], param: str) -> None:
    reply = tiny_server.post("/v1/responses", {"input": "a", "max_output_tokens": 2} | change)
    assert reply.status_code in (400, 404), reply.text
    assert error_of(reply)["param"] == param


def test_what_asks_for_nothing(tiny_server: Server) -> None:
    fields: dict[str, Any] = {
        "model": "tgi",
        "tools": [],
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "include": ["reasoning.encrypted_content"],
        "reasoning": {"effort": None, "summary": "auto"},
        "text": {"format": {"type": "text"}, "verbosity": "medium"},
        "store": True,
        "truncation": "disabled",
        "background": False,
        "conversation": None,
        "previous_response_id": None,
        "prompt_cache_key": "k",
        "service_tier": "auto",
        "stream_options": {"include_obfuscation": True},
        "instructions": None,
    }
    reply = tiny_server.post("/v1/responses", {"input": "a", "max_output_tokens": 2} | fields)
    assert reply.status_code == 200, reply.text


WEATHER: Any = {
    "type": "function",
    "name": "get_weather",
    "description": "Tells the weather.",
    "strict": True,
    "parameters": {
        "type": "object",
        "properties": {"indoors": {"type": "boolean"}},
        "required": ["indoors"],
        "additionalProperties": False,
    },
}


def test_a_tool_that_must_be_called(client: OpenAI) -> None:
    """Even by a random model: whole, in a stream, and with the result sent back."""
    fields: Any = {"tools": [WEATHER], "tool_choice": "required"}
    fields |= {"max_output_tokens": 200, **ASK}
    reply = client.responses.create(**fields)
    (call,) = reply.output
    assert (call.type, call.name, reply.status) == ("function_call", "get_weather", "completed")
    assert json.loads(call.arguments)["indoors"] in (True, False)
    assert (reply.tools[0].name, reply.tool_choice) == ("get_weather", "required")

    events: list[Any] = list(client.responses.create(stream=True, **fields))
    deltas = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    assert [event.type.removeprefix("response.") for event in events] == [
        "created",
        "in_progress",
        "output_item.added",
        *["function_call_arguments.delta"] * len(deltas),
        "function_call_arguments.done",
        "output_item.done",
        "completed",
    ]
    assert "".join(deltas) == events[-3].arguments == call.arguments
    assert [event.sequence_number for event in events] == list(range(len(events)))
    with client.responses.stream(**fields) as stream:
        assert stream.get_final_response().output[0].arguments == call.arguments

    result = {"type": "function_call_output", "call_id": call.call_id, "output": "It rains."}
    history: Any = [{"role": "user", "content": QUESTION}, call.model_dump(), result]
    named = {"type": "function", "name": "get_weather"}
    for choice in ("none", named):
        again: Any = fields | {"input": history, "tool_choice": choice, "max_output_tokens": 100}
        reply = client.responses.create(**again)
        assert [item.type for item in reply.output] == ["message" if choice == "none" else "function_call"]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"tools": [WEATHER, WEATHER]}, "tools.1.name"),
        ({"tools": [WEATHER | {"parameters": {"type": "array"}}]}, "tools.0.parameters.type"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "name": "other"}}, "tool_choice"),
        ({"input": [{"type": "function_call_output", "output": "a"}]}, "input.0.call_id"),
    ],
)
def test_tools_that_cannot_be_called(tiny_server: Server, change: dict[str, Any], param: str) -> None:
    reply = tiny_server.post("/v1/responses", {"input": "a", "max_output_tokens": 2} | change)
    assert reply.status_code == 400, reply.text
    assert error_of(reply)["param"] == param
