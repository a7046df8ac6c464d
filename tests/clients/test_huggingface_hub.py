"""Hugging Face's InferenceClient: chat completions, and text generation as text-generation-inference has it."""

import pytest

huggingface_hub = pytest.importorskip("huggingface_hub")
SCHEMA = {"type": "object", "properties": {"town": {"type": "string", "maxLength": 20}}, "required": ["town"]}


@pytest.fixture
def client(url: str) -> "huggingface_hub.InferenceClient":
    return huggingface_hub.InferenceClient(url)


def test_chat(client: "huggingface_hub.InferenceClient") -> None:
    question = [{"role": "user", "content": "What is the capital of France?"}]
    reply = client.chat_completion(question, max_tokens=40, temperature=0)
    assert "Paris" in reply.choices[0].message.content
    chunks = client.chat_completion(question, max_tokens=40, temperature=0, stream=True)
    assert "Paris" in "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def test_text_generation(client: "huggingface_hub.InferenceClient") -> None:
    assert client.text_generation("The capital of France is", max_new_tokens=1) == " Paris"
    reply = client.text_generation(
        "The capital of France is", max_new_tokens=2, details=True, decoder_input_details=True, top_n_tokens=2
    )
    assert [token.text for token in reply.details.prefill] == ["The", " capital", " of", " France", " is"]
    *_, last = client.text_generation("The capital of France is", max_new_tokens=2, stream=True, details=True)
    assert last.details.generated_tokens == 2
    bound = client.text_generation("Where?", max_new_tokens=60, grammar={"type": "json", "value": SCHEMA})
    assert bound.lstrip().startswith("{")
