"""Tools with the official `openai` package, on a model with random weights: whatever must be called is called."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import jsonschema
import pytest
from openai import BadRequestError, OpenAI, pydantic_function_tool
from openai.types.chat import ChatCompletion
from pydantic import BaseModel, Field

from softbatch.prompt_store.manifest import ModelSpec
from tests.support.models import make_soft_prompt, save_prompt
from tests.support.openai_requests import client_of
from tests.support.servers import Server, error_of, stream_json

QUESTION: Any = [{"role": "user", "content": "Is it raining in Paris?"}]


class GetWeather(BaseModel):
    """The weather of a city."""

    city: Literal["Paris", "Zürich", 'a "b"']
    days: int = Field(ge=1, le=9)


WEATHER = pydantic_function_tool(GetWeather, name="get_weather")
CLOCK: Any = {"type": "function", "function": {"name": "clock", "description": "Tells the time."}}
FIELDS: Any = {"model": "tiny-llama", "messages": QUESTION, "tools": [WEATHER, CLOCK], "max_tokens": 200}


@pytest.fixture(scope="module")
def client(tiny_server: Server) -> Iterator[OpenAI]:
    with client_of(tiny_server) as client:
        yield client


def check_calls(reply: ChatCompletion, *, most: int = 1) -> list[str]:
    """The names that are called; every call is whole, and follows its schema."""
    names = []
    for choice in reply.choices:
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content is None
        calls = choice.message.tool_calls or []
        assert 1 <= len(calls) <= most
        assert len({call.id for call in calls}) == len(calls)
        for call in calls:
            assert call.type == "function"
            names.append(call.function.name)
            arguments = json.loads(call.function.arguments)
            schema = WEATHER["function"]["parameters"] if call.function.name == "get_weather" else {"maxProperties": 0}
            jsonschema.validate(arguments, schema)
    return names


def test_a_required_call_always_parses(client: OpenAI) -> None:
    reply = client.chat.completions.create(**FIELDS, tool_choice="required", n=8, seed=1)
    assert set(check_calls(reply)) <= {"get_weather", "clock"}
    named: Any = {"type": "function", "function": {"name": "get_weather"}}
    reply = client.chat.completions.create(**FIELDS, tool_choice=named, n=3, seed=1, temperature=0)
    assert check_calls(reply) == ["get_weather"] * 3
    (call,) = reply.choices[0].message.tool_calls or []
    turns = [*QUESTION, reply.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "Rain."}]
    answer = client.chat.completions.create(**FIELDS | {"messages": turns, "max_tokens": 4})
    assert answer.usage is not None
    assert reply.usage is not None
    assert answer.usage.prompt_tokens > reply.usage.prompt_tokens


def test_the_packages_own_helpers(client: OpenAI) -> None:
    parsed = client.chat.completions.parse(**FIELDS | {"tools": [WEATHER]}, tool_choice="required", seed=2)
    (call,) = parsed.choices[0].message.tool_calls or []
    assert isinstance(call.function.parsed_arguments, GetWeather)
    with client.chat.completions.stream(**FIELDS | {"tools": [WEATHER]}, tool_choice="required", seed=2) as stream:
        events = [event.type for event in stream]
        final = stream.get_final_completion()
    assert "tool_calls.function.arguments.delta" in events
    (streamed,) = final.choices[0].message.tool_calls or []
    assert streamed.function.parsed_arguments == call.function.parsed_arguments
    assert final.choices[0].finish_reason == "tool_calls"


@pytest.mark.parametrize(
    "fields", [{}, {"logprobs": True, "n": 2}, {"stream_options": {"continuous_usage_stats": True}}]
)
def test_a_stream_says_the_same(tiny_server: Server, fields: dict[str, Any]) -> None:
    body = FIELDS | {"tool_choice": "required", "seed": 7, "parallel_tool_calls": True} | fields
    whole = tiny_server.post("/v1/chat/completions", {key: body[key] for key in body if key != "stream_options"}).json()
    *events, done = stream_json(tiny_server, "/v1/chat/completions", body | {"stream": True})
    assert done == "[DONE]"
    for choice in whole["choices"]:
        deltas = [one for event in events for one in event["choices"] if one["index"] == choice["index"]]
        assert deltas[0]["delta"] == {"role": "assistant", "content": ""}
        assert deltas[-1]["finish_reason"] == choice["finish_reason"]
        calls: list[dict[str, Any]] = []
        for part in (part for one in deltas for part in one["delta"].get("tool_calls", ())):
            if part["index"] == len(calls):
                assert part.keys() == {"index", "id", "type", "function"}
                assert part["function"] == {"name": part["function"]["name"], "arguments": ""}
                calls.append({"name": part["function"]["name"], "arguments": ""})
            else:
                assert part.keys() == {"index", "function"}
                assert part["function"].keys() == {"arguments"}
                calls[part["index"]]["arguments"] += part["function"]["arguments"]
        assert calls == [call["function"] for call in choice["message"]["tool_calls"]]
        if "logprobs" in fields:
            tokens = [token for one in deltas if one["logprobs"] for token in one["logprobs"]["content"]]
            assert [token["token"] for token in tokens] == [one["token"] for one in choice["logprobs"]["content"]]


def test_beside_a_soft_prompt(tiny_server: Server, client: OpenAI, tiny_spec: ModelSpec, tmp_path: Path) -> None:
    prompt = make_soft_prompt("kv", 33, tiny_spec, scale=0.5, replaces="system")
    assert tiny_server.upload("with-tools", save_prompt(prompt, tmp_path, "with-tools")).status_code == 201
    try:
        fields = FIELDS | {"model": "with-tools", "tool_choice": "required", "max_tokens": 100}
        reply = client.chat.completions.create(**fields, n=2, seed=3, logprobs=True, stop=["no such words"])
        check_calls(reply)
        system = {"role": "system", "content": "Be brief."}
        longer = client.chat.completions.create(**fields | {"messages": [system, *QUESTION]}, seed=3)
        assert longer.usage is not None
        assert reply.usage is not None
        assert reply.usage.prompt_tokens < longer.usage.prompt_tokens
    finally:
        tiny_server.http.delete("/v1/soft_prompts/with-tools")


def test_tools_that_are_not_called_change_no_text(client: OpenAI) -> None:
    chosen = client.chat.completions.create(**FIELDS | {"max_tokens": 20}, tool_choice="none", temperature=0)
    plain = client.chat.completions.create(
        **{key: value for key, value in FIELDS.items() if key != "tools"} | {"max_tokens": 20}, temperature=0
    )
    assert chosen.choices[0].message == plain.choices[0].message
    assert chosen.usage is not None
    assert plain.usage is not None
    assert chosen.usage.prompt_tokens == plain.usage.prompt_tokens
    told = client.chat.completions.create(**FIELDS | {"max_tokens": 20}, tool_choice="auto", temperature=0)
    assert told.usage is not None
    assert told.usage.prompt_tokens > plain.usage.prompt_tokens


def test_calls_in_a_history_are_tokenised_and_scored(tiny_server: Server) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "clock", "arguments": "{}"}}
    turns = [
        *QUESTION,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "Noon."},
    ]
    tokens = tiny_server.post("/tokenize", {"messages": turns}).json()["tokens"]
    text = tiny_server.post("/detokenize", {"tokens": tokens}).json()["prompt"]
    assert '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>' in text
    scored = tiny_server.post("/v1/score", {"messages": turns, "candidates": ["Yes", "No"]})
    assert scored.status_code == 200, scored.text


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        (
            {
                "tools": [CLOCK, {"type": "function", "function": {"name": "f", "parameters": {"$ref": "#/no"}}}],
                "tool_choice": "required",
            },
            "tools.1.function.parameters",
            "does not exist",
        ),
        ({"tool_choice": "required", "response_format": {"type": "json_object"}}, "response_format", "must be called"),
        ({"reasoning_effort": "high"}, "reasoning_effort", "knows no effort"),
        ({"chat_template_kwargs": {"enable_thinking": True}}, "chat_template_kwargs", "'enable_thinking'"),
        ({"enable_thinking": True}, "enable_thinking", "reads no"),
        ({"thinking": {"type": "enabled"}}, "thinking", "no effort"),
    ],
)
def test_what_cannot_be_is_refused_by_name(tiny_server: Server, fields: dict[str, Any], param: str, says: str) -> None:
    reply = tiny_server.post("/v1/chat/completions", FIELDS | fields)
    assert reply.status_code == 400, reply.text
    assert error_of(reply)["param"] == param
    assert says in error_of(reply)["message"]


def test_a_schema_that_is_none_names_its_tool(client: OpenAI) -> None:
    tools: Any = [
        CLOCK,
        {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"type": 5}}}}},
    ]
    with pytest.raises(BadRequestError) as caught:
        client.chat.completions.create(**FIELDS | {"tools": tools}, tool_choice="required")
    assert caught.value.param == "tools.1.function.parameters"
