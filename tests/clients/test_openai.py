"""OpenAI's own package: texts, streams, structured output, log-probabilities, completions."""

import pytest
from pydantic import BaseModel

openai = pytest.importorskip("openai")
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


class Town(BaseModel):
    name: str
    country: str


@pytest.fixture
def client(url: str) -> "openai.OpenAI":
    return openai.OpenAI(base_url=f"{url}/v1", api_key="unused")


def test_chat(client: "openai.OpenAI") -> None:
    reply = client.chat.completions.create(model="smollm2-135m", messages=QUESTION, max_tokens=40, temperature=0)
    assert "Paris" in reply.choices[0].message.content


def test_stream(client: "openai.OpenAI") -> None:
    with client.chat.completions.stream(model="smollm2-135m", messages=QUESTION, temperature=0) as stream:
        text = "".join(event.delta for event in stream if event.type == "content.delta")
        assert text == stream.get_final_completion().choices[0].message.content
    assert "Paris" in text


def test_structured_output(client: "openai.OpenAI") -> None:
    reply = client.chat.completions.parse(
        model="smollm2-135m", messages=QUESTION, response_format=Town, max_tokens=200, temperature=0, seed=1
    )
    assert isinstance(reply.choices[0].message.parsed, Town)


def test_completion_with_logprobs(client: "openai.OpenAI") -> None:
    reply = client.completions.create(
        model="smollm2-135m", prompt="The capital of France is", max_tokens=1, logprobs=2, echo=True, temperature=0
    )
    assert reply.choices[0].text == "The capital of France is Paris"
    assert reply.choices[0].logprobs.token_logprobs[-1] > -2


def test_tools(client: "openai.OpenAI") -> None:
    weather = openai.pydantic_function_tool(Town, name="look_up", description="Looks up a town.")
    messages = [*QUESTION]
    reply = client.chat.completions.parse(
        model="smollm2-135m", messages=messages, tools=[weather], tool_choice="required", max_tokens=200, temperature=0
    )
    (call,) = reply.choices[0].message.tool_calls
    assert isinstance(call.function.parsed_arguments, Town)
    messages += [reply.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "It rains in Paris."}]
    answer = client.chat.completions.create(
        model="smollm2-135m", messages=messages, tools=[weather], tool_choice="none", max_tokens=20, temperature=0
    )
    assert answer.choices[0].message.content


def test_responses(client: "openai.OpenAI") -> None:
    fields = {"model": "smollm2-135m", "temperature": 0, "store": False}
    reply = client.responses.create(input=QUESTION, instructions="You are a helpful assistant.", **fields)
    assert "Paris" in reply.output_text
    parsed = client.responses.parse(input=QUESTION, text_format=Town, max_output_tokens=200, **fields)
    assert isinstance(parsed.output_parsed, Town)
    with client.responses.stream(input=QUESTION, max_output_tokens=20, **fields) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        assert text == stream.get_final_response().output_text


def test_embeddings(client: "openai.OpenAI") -> None:
    reply = client.embeddings.create(model="smollm2-135m", input=["The harbour", "A port", "Nine bananas"])
    one, two, three = (item.embedding for item in reply.data)
    near, far = (sum(a * b for a, b in zip(one, other, strict=True)) for other in (two, three))
    assert near > far
