"""`POST /v1/score` against transformers: log-probabilities of answers behind nothing, a context, and a soft prompt."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from softbatch.prompt_store.manifest import ModelSpec
from softbatch.prompt_store.soft_prompt_file import SoftPrompt
from tests.support.models import Reference, make_soft_prompt, save_prompt
from tests.support.servers import Server, error_of

CANDIDATES = ["At seven.", "Never on Sundays", "Ask"]
NAME = "score-kv"


@pytest.fixture(scope="module")
def prompt(tiny_spec: ModelSpec) -> SoftPrompt:
    """One that stands for the system turn, as those of compressions do."""
    return make_soft_prompt("kv", 9, tiny_spec, scale=0.5, replaces="system")


@pytest.fixture(scope="module")
def server(tiny_server: Server, prompt: SoftPrompt, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    path = save_prompt(prompt, tmp_path_factory.mktemp("score"), "score")
    assert tiny_server.upload(NAME, path).status_code == 201
    yield tiny_server
    assert tiny_server.http.delete(f"/v1/soft_prompts/{NAME}").status_code == 200


@torch.inference_mode()
def expected(reference: Reference, text: str, answer: str, end: bool, prompt: SoftPrompt | None) -> list[float]:
    from transformers import DynamicCache

    cache = DynamicCache(config=reference.model.config)
    if prompt is not None:
        for layer in range(prompt.keys.shape[0]):
            cache.update(prompt.keys[layer][None].transpose(1, 2), prompt.values[layer][None].transpose(1, 2), layer)
    shared = reference.tokenizer.encode(text, add_special_tokens=False)
    ids = [*reference.tokenizer.encode(answer, add_special_tokens=False), *([2] if end else [])]
    logits = reference.model(torch.tensor([[*shared, *ids]]), past_key_values=cache).logits[0]
    table = logits.log_softmax(-1)
    return [float(table[len(shared) - 1 + at, token]) for at, token in enumerate(ids)]


CASES: dict[str, dict[str, Any]] = {
    "nothing": {"input": "When?"},
    "a conversation": {"messages": [{"role": "user", "content": "When?"}]},
    "a context": {"input": "When?", "context": "The office opens at seven."},
    "a soft prompt": {"input": "When?", "soft_prompt": NAME},
    "a soft prompt as the model": {"input": "When?", "model": NAME},
    "beginnings of answers": {"input": "When?", "end": False},
}


@pytest.mark.parametrize("case", sorted(CASES))
def test_equals_transformers(server: Server, tiny_llama: Reference, prompt: SoftPrompt, case: str) -> None:
    body = CASES[case]
    reply = server.post("/v1/score", {"candidates": CANDIDATES, **body})
    assert reply.status_code == 200, reply.text
    scored = reply.json()
    soft = NAME in body.values()
    turns = [{"role": "user", "content": "When?"}]
    if "context" in body:
        turns.insert(0, {"role": "system", "content": body["context"]})
    text = tiny_llama.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    if soft:  # it stands for the system turn
        text = text[text.index("<|im_start|>user") :]
    totals = []
    for index, candidate in enumerate(CANDIDATES):
        known = expected(tiny_llama, text, candidate, body.get("end", True), prompt if soft else None)
        found = scored["candidates"][index]
        assert (found["index"], found["text"]) == (index, candidate)
        assert [token["logprob"] for token in found["tokens"]] == pytest.approx(known, abs=2e-4)
        assert found["logprob"] == pytest.approx(sum(known), abs=1e-3)
        totals.append(sum(known))
    assert scored["best"] == max(range(len(totals)), key=totals.__getitem__)
    normaliser = sum(math.exp(total) for total in totals)
    shares = [found["probability"] for found in scored["candidates"]]
    assert shares == pytest.approx([math.exp(total) / normaliser for total in totals], abs=1e-3)
    assert (scored["object"], scored["soft_prompt"]) == ("score", NAME if soft else None)
    assert scored["usage"]["prompt_tokens_details"]["cached_tokens"] == (9 if soft else 0)


REFUSED: dict[str, tuple[dict[str, Any], int, str]] = {
    "no input": ({}, 400, "input"),
    "both": ({"input": "x", "messages": [{"role": "user", "content": "y"}]}, 400, "input"),
    "no candidates": ({"input": "x", "candidates": []}, 400, "candidates"),
    "an empty candidate": ({"input": "x", "candidates": ["a", ""], "end": False}, 400, "candidates.1"),
    "too many": ({"input": "x", "candidates": ["a"] * 300}, 400, "candidates"),
    "a context twice": ({"input": "x", "context": "y", "soft_prompt": NAME}, 400, "context"),
    "an unknown prompt": ({"input": "x", "soft_prompt": "nobody"}, 404, "soft_prompt"),
    "no room": ({"input": "word " * 600}, 400, "input"),
}


@pytest.mark.parametrize("case", sorted(REFUSED))
def test_refuses(server: Server, case: str) -> None:
    body, status, param = REFUSED[case]
    reply = server.post("/v1/score", {"candidates": CANDIDATES, **body})
    assert (reply.status_code, error_of(reply)["param"]) == (status, param), reply.text
