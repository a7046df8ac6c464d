"""The official `anthropic` package against a real server: messages, streams, token counts, errors of its own kinds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import pytest
from anthropic import Anthropic
from pydantic import BaseModel

from softbatch.prompt_store.manifest import ModelSpec
from tests.support.models import Reference, make_soft_prompt, save_prompt
from tests.support.openai_requests import MESSAGES, chat_ids, greedy_text
from tests.support.servers import Server

GREEDY = {"temperature": 0}
SYSTEM, QUESTION = MESSAGES[0]["content"], MESSAGES[1]["content"][0]["text"]
TURNS: Any = [{"role": "user", "content": QUESTION}]


@pytest.fixture(scope="module")
def client(tiny_server: Server) -> Iterator[Anthropic]:
    with client_of(tiny_server) as client:
        yield client


def client_of(server: Server, key: str = "unused") -> Anthropic:
    return Anthropic(base_url=server.url, api_key=key, max_retries=0, timeout=120)


def test_a_message(client: Anthropic, tiny_llama: Reference) -> None:
    reply = client.messages.create(model="tiny-llama", max_tokens=20, system=SYSTEM, messages=TURNS, extra_body=GREEDY)
    ids = chat_ids(tiny_llama)
    assert [block.text for block in reply.content] == [greedy_text(tiny_llama, ids, 20)]
    assert (reply.type, reply.role, reply.model, reply.id[:4]) == ("message", "assistant", "tiny-llama", "msg_")
    assert (reply.stop_reason, reply.stop_sequence) == ("max_tokens", None)
    whole = reply.usage.input_tokens + (reply.usage.cache_read_input_tokens or 0)
    assert (whole, reply.usage.output_tokens) == (len(ids), 20)
    whole_body: Any = {"max_tokens": 20, "stream": True, "temperature": 0}  # as proxies send it
    counted = client.messages.count_tokens(model="tiny-llama", system=SYSTEM, messages=TURNS, extra_body=whole_body)
    assert counted.input_tokens == len(ids)


def test_blocks_and_turns_of_one_speaker(client: Anthropic, tiny_llama: Reference) -> None:
    """A system text in blocks is joined as the parts of a turn are; turns of one speaker are one turn."""
    first, second = SYSTEM.split(" ", 1)
    turns: Any = [
        {"role": "user", "content": [{"type": "text", "text": "One", "cache_control": {"type": "ephemeral"}}]},
        {"role": "user", "content": "Two"},
    ]
    system: Any = [{"type": "text", "text": first}, {"type": "text", "text": second}]
    chat = [{"role": "system", "content": f"{first}\n{second}"}, {"role": "user", "content": "One\nTwo"}]
    text = tiny_llama.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    ids = tiny_llama.tokenizer(text, add_special_tokens=False)["input_ids"]
    reply = client.messages.create(model="tiny-llama", max_tokens=8, system=system, messages=turns, extra_body=GREEDY)
    assert reply.content[0].text == greedy_text(tiny_llama, ids, 8)


def test_a_turn_of_the_assistant_is_the_beginning_of_the_answer(client: Anthropic, tiny_llama: Reference) -> None:
    whole = greedy_text(tiny_llama, chat_ids(tiny_llama), 20)
    text = tiny_llama.tokenizer.apply_chat_template([MESSAGES[0], *TURNS], add_generation_prompt=True, tokenize=False)
    ids = tiny_llama.tokenizer(text + whole[:12], add_special_tokens=False)["input_ids"]
    turns: Any = [*TURNS, {"role": "assistant", "content": whole[:12]}]
    fields: Any = {"model": "tiny-llama", "system": SYSTEM, "messages": turns}
    reply = client.messages.create(max_tokens=8, extra_body=GREEDY, **fields)
    assert reply.content[0].text == greedy_text(tiny_llama, ids, 8)
    assert client.messages.count_tokens(**fields).input_tokens == len(ids)


def test_a_stream(client: Anthropic, tiny_llama: Reference) -> None:
    """Anthropic's events in their order, and the helper's text and final message."""
    fields: Any = {"model": "tiny-llama", "max_tokens": 60, "system": SYSTEM, "messages": TURNS, "extra_body": GREEDY}
    expected = greedy_text(tiny_llama, chat_ids(tiny_llama), 60)
    events = list(client.messages.create(stream=True, **fields))
    kinds = [event.type for event in events]
    deltas = kinds.count("content_block_delta")
    assert deltas > 1
    assert kinds == [
        "message_start",
        "content_block_start",
        *["content_block_delta"] * deltas,
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    with client.messages.stream(**fields) as stream:
        assert "".join(stream.text_stream) == expected
        final = stream.get_final_message()
    assert final.content[0].text == expected
    assert (final.stop_reason, final.usage.output_tokens) == ("max_tokens", 60)


def test_the_wire(tiny_server: Server) -> None:
    """Every event has its type for a name; a ping follows the start."""
    body = {"max_tokens": 4, "messages": TURNS, "stream": True}
    with tiny_server.http.stream("POST", "/v1/messages", json=body) as reply:
        lines = [line for line in reply.iter_lines() if line]
    names = [line.removeprefix("event: ") for line in lines[::2]]
    assert names[:2] == ["message_start", "ping"]
    assert names[-2:] == ["message_delta", "message_stop"]
    for name, data in zip(names, lines[1::2], strict=True):
        assert data.startswith(f'data: {{"type":"{name}"')


def test_stop_sequences(client: Anthropic, tiny_llama: Reference) -> None:
    whole = greedy_text(tiny_llama, chat_ids(tiny_llama), 40)
    stop = whole[len(whole) // 2 :][:6]
    fields: Any = {"model": "tiny-llama", "max_tokens": 40, "system": SYSTEM, "messages": TURNS, "extra_body": GREEDY}
    reply = client.messages.create(stop_sequences=[stop], **fields)
    assert reply.content[0].text == whole[: whole.index(stop)]
    assert (reply.stop_reason, reply.stop_sequence) == ("stop_sequence", stop)
    with client.messages.stream(stop_sequences=[stop], **fields) as stream:
        final = stream.get_final_message()
    assert (final.stop_reason, final.stop_sequence) == ("stop_sequence", stop)


def test_a_limit_that_does_not_fit_is_as_much_as_fits(client: Anthropic) -> None:
    """Anthropic's clients have to name a limit, and name large ones."""
    reply = client.messages.create(
        model="tiny-llama", max_tokens=32_000, messages=TURNS, extra_body=GREEDY | {"timeout_ms": 60_000}
    )
    counted = client.messages.count_tokens(model="tiny-llama", messages=TURNS).input_tokens
    if reply.stop_reason == "model_context_window_exceeded":
        assert counted + reply.usage.output_tokens == 512
    else:
        assert reply.stop_reason == "end_turn"
    none = client.messages.create(model="tiny-llama", max_tokens=0, messages=TURNS)
    assert (none.content, none.stop_reason, none.usage.output_tokens) == ([], "max_tokens", 0)


def test_structured_output(client: Anthropic) -> None:
    class Town(BaseModel):
        people: int

    reply = client.messages.parse(
        model="tiny-llama", max_tokens=200, messages=TURNS, output_format=Town, extra_body={"seed": 3}
    )
    assert isinstance(reply.parsed_output, Town) or reply.stop_reason == "max_tokens"


def test_a_soft_prompt_is_a_model(
    tiny_server: Server, client: Anthropic, tiny_llama: Reference, tiny_spec: ModelSpec, tmp_path: Path
) -> None:
    prompt = make_soft_prompt("kv", 9, tiny_spec, scale=0.5, replaces="system")
    assert tiny_server.upload("anthropic-manual", save_prompt(prompt, tmp_path, "p")).status_code == 201
    text = tiny_llama.tokenizer.apply_chat_template(TURNS, add_generation_prompt=True, tokenize=False)
    bare = client.messages.count_tokens(model="tiny-llama", messages=TURNS).input_tokens
    by_model = client.messages.create(model="anthropic-manual", max_tokens=8, messages=TURNS, extra_body=GREEDY)
    field = GREEDY | {"soft_prompt": "anthropic-manual"}
    by_field = client.messages.create(model="tiny-llama", max_tokens=8, messages=TURNS, extra_body=field)
    assert by_model.content == by_field.content
    assert (by_model.usage.cache_read_input_tokens or 0) >= 9
    counted = client.messages.count_tokens(model="anthropic-manual", messages=TURNS).input_tokens
    usage = by_model.usage
    assert counted == usage.input_tokens + (usage.cache_read_input_tokens or 0)
    assert counted <= bare + 9
    assert text
    assert tiny_server.http.delete("/v1/soft_prompts/anthropic-manual").status_code == 200


def test_errors_are_the_clients_own(client: Anthropic) -> None:
    ask: Any = {"max_tokens": 4, "messages": TURNS}
    for call in (client.messages.create, client.messages.count_tokens):
        fields = ask if call == client.messages.create else {"messages": TURNS}
        with pytest.raises(anthropic.NotFoundError, match="no-such-model") as found:
            call(model="no-such-model", **fields)
        assert found.value.body == {
            "type": "error",
            "error": {
                "type": "not_found_error",
                "message": found.value.body["error"]["message"],
                "param": "model",
                "code": "model_not_found",
            },
        }
    with pytest.raises(anthropic.BadRequestError, match="temperature"):
        client.messages.create(model="tiny-llama", extra_body={"temperature": 3}, **ask)
    with pytest.raises(anthropic.APIStatusError, match="within its time") as late:
        client.messages.create(model="tiny-llama", extra_body={"timeout_ms": 1}, **ask | {"max_tokens": 400})
    assert late.value.type == "timeout_error"


IMAGE = {"type": "image", "source": {"type": "url", "url": "https://example.com/a.png"}}
USER = {"role": "user", "content": "a"}
CALL = {"type": "tool_use", "id": "a", "name": "b", "input": {}}


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": 7}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages.0.content.0.type"),
        ({"messages": [USER, {"role": "assistant", "content": [CALL]}]}, "messages.1.role"),
        ({"system": [IMAGE]}, "system.0.type"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking"),
        ({"stop_sequences": [3]}, "stop_sequences.0"),
        ({"stop": ["x"]}, "stop"),
        ({"mcp_servers": [{"type": "url"}]}, "mcp_servers"),
        ({"output_config": {"effort": "high"}}, "output_config.effort"),
        ({"output_config": {"format": {"type": "json_schema", "schema": 3}}}, "output_config.format.schema"),
        ({"output_config": {"format": {"type": "json_schema", "schema": {"not": {}}}}}, "output_config.format.schema"),
        ({"messages": [{"role": "user", "content": "word " * 600}]}, "messages"),
    ],
)
def test_what_cannot_be_answered(tiny_server: Server, change: dict[str, Any], param: str) -> None:
    reply = tiny_server.post("/v1/messages", {"max_tokens": 4, "messages": TURNS} | change)
    assert reply.status_code == 400, reply.text
    body = reply.json()
    assert (body["type"], body["error"]["type"], body["error"]["param"]) == ("error", "invalid_request_error", param)


def test_what_asks_for_nothing(tiny_server: Server) -> None:
    fields: dict[str, Any] = {
        "model": "tgi",
        "tools": [],
        "tool_choice": {"type": "auto"},
        "thinking": {"type": "disabled"},
        "service_tier": "auto",
        "metadata": {"user_id": "somebody"},
        "cache_control": {"type": "ephemeral"},
        "stop_sequences": None,
        "system": "",
        "top_k": None,
    }
    reply = tiny_server.post("/v1/messages", {"max_tokens": 4, "messages": TURNS} | fields)
    assert reply.status_code == 200, reply.text


def test_other_answers_than_replies_have_the_shape_too(tiny_server: Server) -> None:
    wrong = [
        tiny_server.http.get("/v1/messages"),
        tiny_server.http.post("/v1/messages", content=b"{", headers={"Content-Type": "application/json"}),
    ]
    for reply in wrong:
        assert isinstance(reply, httpx.Response)
        assert reply.json()["type"] == "error", reply.text


WEATHER: Any = {
    "name": "get_weather",
    "description": "Tells the weather.",
    "input_schema": {
        "type": "object",
        "properties": {"indoors": {"type": "boolean"}},
        "required": ["indoors"],
        "additionalProperties": False,
    },
}


def test_a_tool_that_must_be_called(client: Anthropic) -> None:
    """Even by a random model: whole, in a stream, and with the result sent back."""
    fields: Any = {"model": "tiny-llama", "max_tokens": 200, "messages": TURNS, "extra_body": GREEDY}
    fields |= {"tools": [WEATHER], "tool_choice": {"type": "any"}}
    reply = client.messages.create(**fields)
    (call,) = reply.content
    assert (call.type, call.name, reply.stop_reason) == ("tool_use", "get_weather", "tool_use")
    assert call.input["indoors"] in (True, False)
    with client.messages.stream(**fields) as stream:
        kinds = [event.type for event in stream if event.type != "input_json"]
        final = stream.get_final_message()
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(kinds[2:-3]) == {"content_block_delta"}
    assert (final.content[0].input, final.stop_reason) == (call.input, "tool_use")

    result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "It rains."}]}
    history: Any = [
        *TURNS,
        {"role": "assistant", "content": reply.content},
        {"role": "user", "content": [result, {"type": "text", "text": "And now?"}]},
    ]
    fields |= {"messages": history, "max_tokens": 100}
    for choice in ({"type": "none"}, {"type": "tool", "name": "get_weather"}):
        again = client.messages.create(**fields | {"tool_choice": choice})
        assert again.content[0].type == ("text" if choice["type"] == "none" else "tool_use")
    counted = client.messages.count_tokens(model="tiny-llama", messages=history, tools=[WEATHER]).input_tokens
    usage = client.messages.create(**fields | {"tool_choice": {"type": "auto"}, "max_tokens": 1}).usage
    assert counted == usage.input_tokens + (usage.cache_read_input_tokens or 0)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools.0.type"),
        ({"tools": [WEATHER, WEATHER]}, "tools.1.name"),
        ({"tools": [{"name": "a"}]}, "tools.0.input_schema"),
        ({"tools": [{"name": "a b", "input_schema": {}}]}, "tools.0.name"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "other"}}, "tool_choice.name"),
        ({"tools": [WEATHER], "tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]}, "messages.0.content.0.tool_use_id"),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_use", "id": "a", "name": "b", "input": {}}]}]},
            "messages.0.content.0.type",
        ),
    ],
)
def test_tools_that_cannot_be_called(tiny_server: Server, change: dict[str, Any], param: str) -> None:
    reply = tiny_server.post("/v1/messages", {"max_tokens": 4, "messages": TURNS} | change)
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["param"] == param
