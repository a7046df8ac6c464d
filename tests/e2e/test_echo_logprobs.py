"""Log-probabilities of prompts on `/v1/completions`, against transformers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

from softbatch.prompt_store.manifest import ModelSpec
from softbatch.prompt_store.soft_prompt_file import SoftPrompt
from tests.support.models import Reference, make_soft_prompt, save_prompt
from tests.support.servers import Server, stream_json

ROUTE = "/v1/completions"
TEXTS = ["The café opens at seven. Ring the bell twice, and wait for the 日本 keeper 🙂 there.", "It is"]
NAME = "echo-kv"


@pytest.fixture(scope="module")
def prompt(tiny_spec: ModelSpec) -> SoftPrompt:
    return make_soft_prompt("kv", 9, tiny_spec, scale=0.5)


@pytest.fixture(scope="module")
def server(tiny_server: Server, prompt: SoftPrompt, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    path = save_prompt(prompt, tmp_path_factory.mktemp("echo"), "echo")
    assert tiny_server.upload(NAME, path).status_code == 201
    yield tiny_server
    assert tiny_server.http.delete(f"/v1/soft_prompts/{NAME}").status_code == 200


@torch.inference_mode()
def table_of(reference: Reference, token_ids: Sequence[int], prompt: SoftPrompt | None = None) -> torch.Tensor:
    cache = reference._cache_of(prompt) if prompt is not None else None
    return reference.model(torch.tensor([list(token_ids)]), past_key_values=cache).logits[0].log_softmax(-1)


def ask(server: Server, **body: Any) -> list[dict[str, Any]]:
    reply = server.post(ROUTE, {"temperature": 0, "ignore_eos": True, **body})
    assert reply.status_code == 200, reply.text
    choices: list[dict[str, Any]] = reply.json()["choices"]
    return choices


def check_logprobs(found: dict[str, Any], table: torch.Tensor, ids: Sequence[int], top: int) -> None:
    logprobs, alternatives = found["token_logprobs"], found["top_logprobs"]
    assert (logprobs[0], alternatives[0]) == (None, None)
    expected = [float(row[token]) for row, token in zip(table, ids[1:], strict=False)]
    assert logprobs[1:] == pytest.approx(expected, abs=1e-4)
    for row, own, others in zip(table, logprobs[1:], alternatives[1:], strict=False):
        assert own in others.values() or own < max(others.values())  # of two tokens of one text the better one is shown
        assert len(others) <= top + 1
        best = max(others.values())
        assert best == pytest.approx(float(row.max() if top else best), abs=1e-4)


@pytest.mark.parametrize("soft", [False, True], ids=["alone", "behind a soft prompt"])
@pytest.mark.parametrize("max_tokens", [0, 1, 3])
@pytest.mark.parametrize("form", ["text", "ids", "texts", "lists of ids"])
def test_equals_transformers(
    server: Server, tiny_llama: Reference, prompt: SoftPrompt, form: str, max_tokens: int, soft: bool
) -> None:
    encoded = [tiny_llama.tokenizer(text)["input_ids"] for text in TEXTS]
    sent = {"text": TEXTS[0], "ids": encoded[0], "texts": TEXTS, "lists of ids": encoded}[form]
    more = {"soft_prompt": NAME} if soft else {}
    choices = ask(server, prompt=sent, max_tokens=max_tokens, echo=True, logprobs=2, **more)
    assert len(choices) == (2 if form in ("texts", "lists of ids") else 1)
    for choice, text, ids in zip(choices, TEXTS, encoded, strict=False):
        generated = tiny_llama.generate(ids, max_tokens, prompt if soft else None) if max_tokens else []
        whole = [*ids, *generated]
        assert choice["text"] == text + tiny_llama.tokenizer.decode(generated)
        assert choice["finish_reason"] == "length"
        found = choice["logprobs"]
        check_logprobs(found, table_of(tiny_llama, whole, prompt if soft else None), whole, 2)
        assert {len(values) for values in found.values()} == {len(whole)}
        assert found["text_offset"] == sorted(found["text_offset"])
        for token, at in zip(found["tokens"], found["text_offset"], strict=True):
            assert "\ufffd" in token or choice["text"].startswith(token, at)


def test_prompt_logprobs_are_as_vllm_reports_them(server: Server, tiny_llama: Reference) -> None:
    ids = tiny_llama.tokenizer(TEXTS[0])["input_ids"]
    table = table_of(tiny_llama, ids)
    one, other = ask(server, prompt=TEXTS[0], max_tokens=2, prompt_logprobs=3, n=2)
    assert one["logprobs"] is None
    assert one["prompt_logprobs"] == other["prompt_logprobs"]
    first, *found = one["prompt_logprobs"]
    assert first is None
    assert len(found) == len(ids) - 1
    for row, token, entries in zip(table, ids[1:], found, strict=False):
        assert next(iter(entries)) == str(token)
        assert entries[str(token)]["rank"] == pytest.approx(int((row > row[token]).sum()) + 1, abs=3)
        for each, entry in entries.items():
            assert entry["logprob"] == pytest.approx(float(row[int(each)]), abs=1e-4)
        assert {1, 2, 3} <= {entry["rank"] for entry in entries.values()}
        assert entries[str(token)]["decoded_token"] == tiny_llama.tokenizer.decode([token])
    both = ask(server, prompt=TEXTS[0], max_tokens=0, prompt_logprobs=0, echo=True, logprobs=3)
    assert [list(entries) for entries in both[0]["prompt_logprobs"][1:]] == [[str(token)] for token in ids[1:]]
    assert max(len(others) for others in both[0]["logprobs"]["top_logprobs"][1:]) == 4
    assert "prompt_logprobs" not in ask(server, prompt="It is", max_tokens=1)[0]


def test_a_stream_begins_with_the_prompt(server: Server) -> None:
    body = {"prompt": TEXTS, "max_tokens": 4, "temperature": 0.7, "seed": 3, "n": 2, "echo": True, "logprobs": 1}
    body |= {"ignore_eos": True}
    whole = ask(server, **body)
    *events, done = stream_json(server, ROUTE, body | {"stream": True})
    assert done == "[DONE]"
    for choice in whole:
        parts = [each for event in events for each in event["choices"] if each["index"] == choice["index"]]
        assert parts[0]["text"].startswith(TEXTS[choice["index"] // 2])
        assert "".join(part["text"] for part in parts) == choice["text"]
        for name, values in choice["logprobs"].items():
            joined = [value for part in parts for value in part["logprobs"][name]]
            if name == "token_logprobs":
                assert joined[0] is None
                assert joined[1:] == pytest.approx(values[1:], abs=1e-4)
            elif name != "top_logprobs":
                assert joined == values
    *events, _ = stream_json(server, ROUTE, {"prompt": "It is", "max_tokens": 0, "echo": True, "stream": True})
    assert [(event["choices"][0]["text"], event["choices"][0]["finish_reason"]) for event in events] == [
        ("It is", "length")
    ]


def test_equals_the_score_of_an_answer(server: Server, tiny_llama: Reference) -> None:
    """Also a second time, when the prefix cache holds the prompt."""
    turns = [{"role": "user", "content": "When does the office by the harbour open, and who has the keys to it?"}]
    text = tiny_llama.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    scored = server.post("/v1/score", {"messages": turns, "candidates": ["At seven."], "end": False}).json()
    tokens = scored["candidates"][0]["tokens"]
    assert ask(server, prompt=text, max_tokens=2, add_special_tokens=False)
    for _ in range(2):
        (choice,) = ask(
            server, prompt=text + "At seven.", max_tokens=0, echo=True, logprobs=1, add_special_tokens=False
        )
        assert choice["text"] == text + "At seven.", "special tokens that were sent are part of the text"
        found = choice["logprobs"]
        assert found["tokens"][-len(tokens) :] == [token["text"] for token in tokens]
        assert found["token_logprobs"][-len(tokens) :] == pytest.approx([t["logprob"] for t in tokens], abs=1e-4)
        assert choice["text"][found["text_offset"][-len(tokens)] :] == "At seven."


def test_no_tokens_at_all(server: Server) -> None:
    reply = server.post(ROUTE, {"prompt": "It is", "max_tokens": 0}).json()
    assert [reply["choices"][0][name] for name in ("text", "finish_reason", "logprobs")] == ["", "length", None]
    assert reply["usage"]["completion_tokens"] == 0
    (choice,) = ask(server, prompt=[504], max_tokens=1, echo=True, logprobs=1)
    assert choice["logprobs"]["token_logprobs"][0] is None
    assert len(choice["logprobs"]["tokens"]) == 2
