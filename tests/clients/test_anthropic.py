"""Anthropic's own package: messages, streams, tools, and how many tokens a request has."""

import pytest

anthropic = pytest.importorskip("anthropic")
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
GREEDY = {"extra_body": {"temperature": 0}}
TOOL = {
    "name": "look_up",
    "description": "Looks up a town.",
    "input_schema": {
        "type": "object",
        "properties": {"town": {"type": "string", "maxLength": 20}},
        "required": ["town"],
    },
}


@pytest.fixture
def client(url: str) -> "anthropic.Anthropic":
    return anthropic.Anthropic(base_url=url, api_key="unused")


def test_messages_and_stream(client: "anthropic.Anthropic") -> None:
    fields = {"model": "smollm2-135m", "system": "You are a helpful assistant.", "messages": QUESTION, "max_tokens": 40}
    reply = client.messages.create(**fields, **GREEDY)
    assert "Paris" in reply.content[0].text
    with client.messages.stream(**fields, **GREEDY) as stream:
        assert "".join(stream.text_stream) == reply.content[0].text
    counted = client.messages.count_tokens(**{name: value for name, value in fields.items() if name != "max_tokens"})
    assert counted.input_tokens == reply.usage.input_tokens + (reply.usage.cache_read_input_tokens or 0)


def test_tools(client: "anthropic.Anthropic") -> None:
    reply = client.messages.create(
        model="smollm2-135m",
        messages=QUESTION,
        tools=[TOOL],
        tool_choice={"type": "tool", "name": "look_up"},
        max_tokens=100,
        **GREEDY,
    )
    (call,) = [block for block in reply.content if block.type == "tool_use"]
    assert (reply.stop_reason, call.name, [*call.input]) == ("tool_use", "look_up", ["town"])
