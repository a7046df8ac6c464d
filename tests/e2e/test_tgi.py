"""text-generation-inference's routes: the shapes its clients parse, its headers, and our soft prompts in them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from softbatch.prompt_store.manifest import ModelSpec
from tests.support.models import Reference, make_soft_prompt, save_prompt
from tests.support.servers import Server, error_of, stream_json

INPUTS = "Why does everybody talk about rain"
TOKEN_FIELDS = {"id", "text", "logprob", "special"}


def generate(server: Server, route: str = "/generate", **parameters: Any) -> Any:
    reply = server.post(route, {"inputs": INPUTS, "parameters": parameters})
    assert reply.status_code == 200, reply.text
    return reply.json()


@pytest.fixture(scope="module")
def output(tiny_llama: Reference) -> list[int]:
    """The model's own greedy answer, 12 tokens."""
    return tiny_llama.generate(tiny_llama.tokenizer(INPUTS)["input_ids"], 12)


@pytest.fixture(scope="module")
def text(tiny_llama: Reference, output: list[int]) -> str:
    return str(tiny_llama.tokenizer.decode(output))


def test_without_details_there_is_only_the_text(tiny_server: Server, text: str) -> None:
    assert generate(tiny_server, max_new_tokens=12) == {"generated_text": text}
    assert generate(tiny_server, max_new_tokens=12, return_full_text=True) == {"generated_text": INPUTS + text}


def test_platforms_have_other_names_for_the_routes(tiny_server: Server, text: str) -> None:
    assert tiny_server.http.get("/ping").json() == {"status": "ok"}
    reply = tiny_server.post("/invocations", {"inputs": INPUTS, "parameters": {"max_new_tokens": 12}})
    assert reply.json() == [{"generated_text": text}]
    refused = tiny_server.post("/invocations", {"inputs": 5})
    assert (refused.status_code, refused.json()["error_type"]) == (400, "validation")


def test_tokens_and_their_places(tiny_server: Server, tiny_llama: Reference) -> None:
    words = "Café 日本"
    tokens = tiny_server.post("/tokenize", {"inputs": words, "parameters": {"max_new_tokens": 1}}).json()
    assert [token["id"] for token in tokens] == tiny_llama.tokenizer(words)["input_ids"]
    assert all(token["text"] == words[token["start"] : token["stop"]] for token in tokens)
    assert "".join(dict.fromkeys(token["text"] for token in tokens)) == words
    both = tiny_server.post("/tokenize", {"inputs": words, "prompt": words})
    assert (both.status_code, error_of(both)["param"]) == (400, "prompt")


def test_do_sample_false_is_greedy_whatever_the_temperature(tiny_server: Server, text: str) -> None:
    reply = generate(tiny_server, max_new_tokens=12, do_sample=False, temperature=5.0, seed=3)
    assert reply == {"generated_text": text}
    sampled = [generate(tiny_server, max_new_tokens=12, do_sample=True, seed=3) for _ in range(2)]
    assert sampled[0] == sampled[1] != reply


def test_details(tiny_server: Server, output: list[int], text: str) -> None:
    reply = generate(tiny_server, max_new_tokens=12, details=True, top_n_tokens=2)
    assert reply["generated_text"] == text
    details = reply["details"]
    assert set(details) == {"finish_reason", "generated_tokens", "seed", "prefill", "tokens", "top_tokens"}
    assert (details["finish_reason"], details["generated_tokens"], details["seed"]) == ("length", 12, None)
    assert details["prefill"] == []
    assert [token["id"] for token in details["tokens"]] == output
    assert "".join(token["text"] for token in details["tokens"]) == text
    for token, top in zip(details["tokens"], details["top_tokens"], strict=True):
        assert set(token) == TOKEN_FIELDS
        assert token["special"] is False
        assert math.exp(token["logprob"]) < 1
        assert top[0]["id"] == token["id"]
        assert top[0]["logprob"] >= top[1]["logprob"]
    seeded = generate(tiny_server, max_new_tokens=3, details=True, do_sample=True, seed=41)
    assert seeded["details"]["seed"] == 41


def test_a_stop_string_ends_the_text_and_stays_in_it(tiny_server: Server, text: str) -> None:
    stop = text[len(text) // 2 : len(text) // 2 + 5]
    reply = generate(tiny_server, max_new_tokens=12, stop=[stop], details=True)
    assert reply["generated_text"] == text[: text.index(stop) + len(stop)]
    assert reply["details"]["finish_reason"] == "stop_sequence"


def test_end_of_text_is_a_token_without_text(smollm2_server: Server, smollm2: Reference) -> None:
    question = [{"role": "user", "content": "What is the capital of France?"}]
    chat = smollm2.tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    output = smollm2.generate(smollm2.tokenizer(chat, add_special_tokens=False)["input_ids"], 24)
    assert output[-1] == smollm2.model.generation_config.eos_token_id
    body = {"inputs": chat, "parameters": {"max_new_tokens": 24, "details": True}}
    reply = smollm2_server.post("/generate", body).json()
    assert reply["generated_text"] == smollm2.tokenizer.decode(output[:-1])
    assert reply["details"]["finish_reason"] == "eos_token"
    assert [token["id"] for token in reply["details"]["tokens"]] == output
    assert [token["special"] for token in reply["details"]["tokens"]] == [False] * (len(output) - 1) + [True]
    del body["parameters"]["details"]
    last = stream_json(smollm2_server, "/generate_stream", body)[-1]
    assert last["token"]["special"] is True
    assert last["generated_text"] == reply["generated_text"]
    assert last["details"]["finish_reason"] == "eos_token"


def test_stream(tiny_server: Server, output: list[int], text: str) -> None:
    body = {"inputs": INPUTS, "parameters": {"max_new_tokens": 12}}
    events = stream_json(tiny_server, "/generate_stream", body)
    assert [event["index"] for event in events] == list(range(1, 13))
    assert [event["token"]["id"] for event in events] == output
    assert "".join(event["token"]["text"] for event in events) == text
    for event in events:
        assert set(event) == {"index", "token", "generated_text", "details"}
        assert set(event["token"]) == TOKEN_FIELDS
    assert all(event["generated_text"] is None and event["details"] is None for event in events[:-1])
    assert events[-1]["generated_text"] == text
    assert set(events[-1]["details"]) == {"finish_reason", "generated_tokens", "seed", "input_length"}
    assert events[-1]["details"]["finish_reason"] == "length"
    assert events[-1]["details"]["generated_tokens"] == 12


def test_headers(tiny_server: Server, tiny_llama: Reference) -> None:
    reply = tiny_server.post("/generate", {"inputs": INPUTS, "parameters": {"max_new_tokens": 7}})
    times = ("x-total-time", "x-queue-time", "x-inference-time", "x-time-per-token")
    total, queue, inference, per_token = (int(reply.headers[name]) for name in times)
    # Milliseconds, each rounded by itself.
    assert abs(total - queue - inference) <= 1
    assert abs(inference - 7 * per_token) <= 4
    assert int(reply.headers["x-generated-tokens"]) == 7
    assert int(reply.headers["x-prompt-tokens"]) == len(tiny_llama.tokenizer(INPUTS)["input_ids"])
    body = {"inputs": INPUTS, "parameters": {"max_new_tokens": 2}}
    with tiny_server.http.stream("POST", "/generate_stream", json=body) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        assert stream.headers["cache-control"] == "no-cache"
        assert stream.headers["x-accel-buffering"] == "no"


def test_the_root_route_does_both(tiny_server: Server, text: str) -> None:
    assert generate(tiny_server, "/", max_new_tokens=12) == [{"generated_text": text}]
    body = {"inputs": INPUTS, "stream": True, "parameters": {"max_new_tokens": 12}}
    assert stream_json(tiny_server, "/", body)[-1]["generated_text"] == text


def test_truncate_keeps_the_last_tokens(tiny_server: Server, tiny_llama: Reference) -> None:
    ids = tiny_llama.tokenizer(INPUTS)["input_ids"]
    expected = tiny_llama.tokenizer.decode(tiny_llama.generate(ids[-3:], 8))
    assert generate(tiny_server, max_new_tokens=8, truncate=3) == {"generated_text": expected}


def test_a_text_of_any_length_can_be_truncated(tiny_server: Server) -> None:
    long = {"inputs": "word " * 60_000 + INPUTS, "parameters": {"max_new_tokens": 8, "truncate": 9}}
    short = {"inputs": "word " * 9 + INPUTS, "parameters": {"max_new_tokens": 8, "truncate": 9}}
    assert tiny_server.post("/generate", long).json() == tiny_server.post("/generate", short).json()


def test_best_of_tells_the_most_probable_text_first(tiny_server: Server) -> None:
    fields: dict[str, Any] = {"max_new_tokens": 5, "do_sample": True, "temperature": 3.0, "details": True}
    reply = generate(tiny_server, best_of=3, seed=7, **fields)
    alone = [generate(tiny_server, seed=7 + at, **fields) for at in range(3)]

    def likely(tokens: list[dict[str, Any]]) -> float:
        return sum(token["logprob"] for token in tokens) / len(tokens)

    alone.sort(key=lambda one: likely(one["details"]["tokens"]), reverse=True)
    others = reply["details"].pop("best_of_sequences")
    assert reply == alone[0]
    assert others == [one["details"] | {"generated_text": one["generated_text"]} for one in alone[1:]]


def test_decoder_input_details_score_the_input(tiny_server: Server, tiny_llama: Reference) -> None:
    ids = tiny_llama.tokenizer(INPUTS)["input_ids"]
    with torch.inference_mode():
        table = torch.log_softmax(tiny_llama.model(torch.tensor([ids])).logits[0], -1)
    expected = [float(table[at, token]) for at, token in enumerate(ids[1:])]
    for extra in ({}, {"best_of": 2, "do_sample": True}):
        reply = generate(tiny_server, max_new_tokens=1, details=True, decoder_input_details=True, **extra)
        for details in (reply["details"], *reply["details"].get("best_of_sequences", [])):
            first, *rest = details["prefill"]
            assert first == {"id": ids[0], "text": tiny_llama.tokenizer.decode(ids[0]), "logprob": None}
            assert [token["id"] for token in rest] == ids[1:]
            assert [token["logprob"] for token in rest] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("kind", ["embeddings", "kv"])
def test_soft_prompt(
    tiny_server: Server, tiny_llama: Reference, tiny_spec: ModelSpec, tmp_path: Path, kind: str, text: str
) -> None:
    prompt = make_soft_prompt(kind, 19, tiny_spec, scale=0.5)
    assert tiny_server.upload(f"tgi-{kind}", save_prompt(prompt, tmp_path, kind)).status_code == 201
    ids = tiny_llama.tokenizer(INPUTS)["input_ids"]
    expected = tiny_llama.tokenizer.decode(tiny_llama.generate(ids, 12, prompt))
    assert expected != text
    for field in ("soft_prompt", "adapter_id"):
        assert generate(tiny_server, max_new_tokens=12, **{field: f"tgi-{kind}"}) == {"generated_text": expected}
    body = {"inputs": INPUTS, "parameters": {"max_new_tokens": 12, "soft_prompt": f"tgi-{kind}"}}
    last = stream_json(tiny_server, "/generate_stream", body)[-1]
    assert last["generated_text"] == expected
    assert last["details"]["input_length"] == 19 + len(ids)
    assert tiny_server.http.delete(f"/v1/soft_prompts/tgi-{kind}").status_code == 200
    gone = tiny_server.post("/generate", body)
    assert gone.status_code == 404
    assert error_of(gone)["code"] == "soft_prompt_not_found"


def test_info(tiny_server: Server) -> None:
    info = tiny_server.http.get("/info").json()
    assert (info["model_id"], info["model_dtype"], info["model_device_type"]) == ("tiny-llama", "float32", "cpu")
    assert (info["max_total_tokens"], info["max_input_tokens"]) == (512, 511)
    assert info["version"] == tiny_server.http.get("/version").json()["version"]


def test_errors_have_the_types_that_its_clients_know(tiny_server: Server) -> None:
    """The text-generation client and huggingface_hub make their own exceptions of `error` and `error_type`."""
    for route in ("/", "/generate", "/generate_stream"):
        reply = tiny_server.post(route, {"inputs": INPUTS, "parameters": {"top_p": 2}})
        assert reply.status_code == 400
        error = reply.json()
        assert (error["error_type"], error["param"]) == ("validation", "parameters.top_p")
        assert error["error"].startswith("parameters.top_p: ")
    assert tiny_server.post("/generate", {}).json()["error_type"] == "validation"
    unknown = {"inputs": INPUTS, "parameters": {"adapter_id": "nobody"}}
    assert tiny_server.post("/generate", unknown).json()["error_type"] == "not_found"
