"""Texts that are no plain words: broken characters, special tokens, tokenizers that fall back to bytes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.models import Reference, save_tiny
from tests.support.servers import Server, running_server, stream_json
from tests.support.tokenizers_of_bytes import as_transformers, byte_fallback

HALF_A_CHARACTER = [504, 2399, 314, 17097, 133]
BROKEN = "The menu says caf\ufffd"


@pytest.fixture(scope="module")
def fallback_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    path = tmp_path_factory.mktemp("models") / "fallback"
    tokenizer = as_transformers(byte_fallback())
    save_tiny("llama", path, tokenizer, vocab_size=len(tokenizer))
    flags = ("--model", str(path), "--dtype", "float32", "--kv-cache-gib", "0.01")
    with running_server(tmp_path_factory.mktemp("fallback-server"), *flags) as server:
        yield server


@pytest.mark.parametrize("prompt", [BROKEN, HALF_A_CHARACTER], ids=["U+FFFD", "half a character"])
def test_the_continuation_alone(tiny_server: Server, tiny_llama: Reference, prompt: str | list[int]) -> None:
    tokenizer = tiny_llama.tokenizer
    ids = tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt
    expected = tokenizer.decode(tiny_llama.generate(ids, 12))
    ask = {"prompt": prompt, "max_tokens": 12, "temperature": 0, "stop": ["menu"]}
    assert tiny_server.complete(prompt, 12) == tiny_server.complete(prompt, 12, stop=["menu"]) == expected
    assert tiny_server.complete(prompt, 12, echo=True) == tokenizer.decode(ids) + expected
    *events, done = stream_json(tiny_server, "/v1/completions", ask | {"stream": True})
    assert done == "[DONE]"
    assert "".join(event["choices"][0]["text"] for event in events) == expected
    if isinstance(prompt, str):
        parameters = {"max_new_tokens": 12, "do_sample": False}
        body = {"inputs": prompt, "parameters": parameters}
        assert tiny_server.post("/generate", body).json()["generated_text"] == expected


def test_byte_fallback(fallback_server: Server) -> None:
    """Noise from such a tokenizer is mostly broken characters."""
    for seed in range(4):
        ask = {"prompt": "hello", "max_tokens": 200, "temperature": 2, "seed": seed, "ignore_eos": True, "logprobs": 2}
        whole = fallback_server.post("/v1/completions", ask)
        assert whole.status_code == 200, whole.text
        (choice,) = whole.json()["choices"]
        assert choice["finish_reason"] == "length"
        assert "\ufffd" in choice["text"]
        *events, done = stream_json(fallback_server, "/v1/completions", ask | {"stream": True})
        assert done == "[DONE]"
        assert "".join(event["choices"][0]["text"] for event in events) == choice["text"]
        offsets = [at for event in events for at in event["choices"][0]["logprobs"]["text_offset"]]
        assert offsets == choice["logprobs"]["text_offset"] == sorted(offsets)
        assert len(offsets) == 200


@pytest.mark.parametrize("stop", [[], ["e"]])
def test_bytes_of_logprobs_join_to_the_content(tiny_server: Server, stop: list[str]) -> None:
    messages = [{"role": "user", "content": "hello 🙂"}]
    ask = {"messages": messages, "max_tokens": 60, "temperature": 2, "seed": 4, "logprobs": True, "stop": stop}
    (choice,) = tiny_server.post("/v1/chat/completions", ask).json()["choices"]
    tokens = choice["logprobs"]["content"]
    assert bytes(byte for token in tokens for byte in token["bytes"]).decode() == choice["message"]["content"]
    assert "\ufffd" in choice["message"]["content"] or stop


def test_places_of_tokens_in_the_text(fallback_server: Server) -> None:
    ask = {"prompt": "hello", "max_tokens": 100, "temperature": 2, "seed": 1, "logprobs": 0}
    (choice,) = fallback_server.post("/v1/completions", ask).json()["choices"]
    for token, at in zip(choice["logprobs"]["tokens"], choice["logprobs"]["text_offset"], strict=True):
        assert "\ufffd" in token or token.startswith("<") or choice["text"].startswith(token, at)


@pytest.mark.parametrize("stop", ["<|im_end|>", "<|im_end|>\n"])
def test_a_special_token_as_a_stop_string(smollm2_server: Server, stop: str) -> None:
    question = [{"role": "user", "content": "What is the capital of France?"}]
    ask = {"messages": question, "max_tokens": 24, "temperature": 0}
    (plain,) = smollm2_server.post("/v1/chat/completions", ask).json()["choices"]
    (choice,) = smollm2_server.post("/v1/chat/completions", ask | {"ignore_eos": True, "stop": [stop]}).json()[
        "choices"
    ]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)
    assert choice["message"]["content"] == plain["message"]["content"]
