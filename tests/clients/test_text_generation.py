"""text-generation-inference's own client."""

import pytest

text_generation = pytest.importorskip("text_generation")


def test_generate_and_stream(url: str) -> None:
    client = text_generation.Client(url, timeout=60)
    reply = client.generate("The capital of France is", max_new_tokens=2, decoder_input_details=True, top_n_tokens=2)
    assert reply.generated_text.startswith(" Paris")
    assert reply.details.prefill[-1].logprob < 0
    best = client.generate("The capital of France is", max_new_tokens=2, best_of=2, do_sample=True)
    assert len(best.details.best_of_sequences) == 1
    parts = client.generate_stream("The capital of France is", max_new_tokens=2)
    assert "".join(part.token.text for part in parts) == reply.generated_text


def test_mistakes_raise_the_clients_own_errors(url: str) -> None:
    with pytest.raises(text_generation.errors.ValidationError, match="exceed"):
        text_generation.Client(url, timeout=60).generate("x", max_new_tokens=1_000_000)


def test_chat(url: str) -> None:
    client = text_generation.Client(url, timeout=60)
    reply = client.chat(
        [{"role": "user", "content": "What is the capital of France?"}], max_tokens=40, temperature=0.01
    )
    assert "Paris" in reply.choices[0].message.content
