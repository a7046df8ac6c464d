"""LiteLLM, with softbatch as an OpenAI-compatible server."""

import pytest

litellm = pytest.importorskip("litellm")
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


def test_chat_and_stream(url: str) -> None:
    where = {"model": "openai/smollm2-135m", "api_base": f"{url}/v1", "api_key": "unused"}
    reply = litellm.completion(messages=QUESTION, max_tokens=40, temperature=0, **where)
    assert "Paris" in reply.choices[0].message.content
    chunks = litellm.completion(messages=QUESTION, max_tokens=40, temperature=0, stream=True, **where)
    assert "Paris" in "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


def test_text_completion(url: str) -> None:
    reply = litellm.text_completion(
        model="text-completion-openai/smollm2-135m",
        api_base=f"{url}/v1",
        api_key="unused",
        prompt="The capital of France is",
        max_tokens=1,
        temperature=0,
    )
    assert reply.choices[0].text == " Paris"
