"""`/v1/embeddings` by the official client: the vectors of transformers' hidden states, and clear refusals."""

from __future__ import annotations

import base64
import json
import math
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from openai import BadRequestError, NotFoundError, OpenAI

from softbatch.prompt_store.manifest import ModelSpec
from softbatch.prompt_store.soft_prompt_file import SoftPrompt
from softbatch.scheduler.protocol import Pooling
from tests.support.models import Reference, make_soft_prompt, save_prompt
from tests.support.openai_requests import client_of
from tests.support.pooling import pooled_states
from tests.support.servers import Server, error_of

TEXTS = ["The harbour office opens at seven.", "Ring the brass bell twice, and wait.", "Bread"]


@pytest.fixture(scope="module")
def client(tiny_server: Server) -> Iterator[OpenAI]:
    with client_of(tiny_server) as client:
        yield client


def expected(
    reference: Reference, text: str, pooling: Pooling = "mean", prompt: SoftPrompt | None = None
) -> list[float]:
    return of_length_one(pooled_states(reference, reference.tokenizer(text)["input_ids"], pooling, prompt))


def of_length_one(vector: Sequence[float]) -> list[float]:
    return [value / math.hypot(*vector) for value in vector]


@pytest.mark.parametrize("encoding", ["float", "base64"])  # the client asks for base64 if nothing is said
def test_vectors_equal_transformers(client: OpenAI, tiny_llama: Reference, encoding: Any) -> None:
    reply = client.embeddings.create(model="tiny-llama", input=TEXTS, encoding_format=encoding)
    assert [each.index for each in reply.data] == [0, 1, 2]
    for text, found in zip(TEXTS, reply.data, strict=True):
        vector: Any = found.embedding
        if isinstance(vector, str):
            vector = array("f", base64.b64decode(vector)).tolist()
        assert vector == pytest.approx(expected(tiny_llama, text), abs=1e-4)
    tokens = sum(len(tiny_llama.tokenizer(text)["input_ids"]) for text in TEXTS)
    assert (reply.usage.prompt_tokens, reply.usage.total_tokens, reply.model) == (tokens, tokens, "tiny-llama")


def test_every_kind_of_input(client: OpenAI, tiny_llama: Reference) -> None:
    ids = [tiny_llama.tokenizer(text)["input_ids"] for text in TEXTS]
    for several in (TEXTS, ids):
        alone = [client.embeddings.create(model="tiny-llama", input=one).data[0].embedding for one in several]
        together = client.embeddings.create(model="tiny-llama", input=several)
        for one, other in zip(alone, together.data, strict=True):
            assert one == pytest.approx(other.embedding, abs=1e-5)


def test_dimensions_and_pooling(client: OpenAI, tiny_llama: Reference) -> None:
    pooling = {"pooling": "last"}
    reply = client.embeddings.create(model="tiny-llama", input=TEXTS[0], dimensions=16, extra_body=pooling)
    whole = expected(tiny_llama, TEXTS[0], "last")
    assert reply.data[0].embedding == pytest.approx(of_length_one(whole[:16]), abs=1e-4)


def test_behind_a_soft_prompt(
    tiny_server: Server, client: OpenAI, tiny_llama: Reference, tiny_spec: ModelSpec, tmp_path: Path
) -> None:
    """It moves the vectors, and a name that nobody has registered is the client's own 404."""
    prompt = make_soft_prompt("embeddings", 13, tiny_spec)
    assert tiny_server.upload("embed-manual", save_prompt(prompt, tmp_path, "p")).status_code == 201
    reply = client.embeddings.create(model="embed-manual", input=TEXTS[:2])
    for text, found in zip(TEXTS, reply.data, strict=False):
        assert found.embedding == pytest.approx(expected(tiny_llama, text, prompt=prompt), abs=1e-4)
    tokens = sum(len(tiny_llama.tokenizer(text)["input_ids"]) + 13 for text in TEXTS[:2])
    assert reply.usage.prompt_tokens == tokens
    assert tiny_server.http.delete("/v1/soft_prompts/embed-manual").status_code == 200
    with pytest.raises(NotFoundError, match="embed-manual"):
        client.embeddings.create(model="embed-manual", input=TEXTS[0])


def test_more_texts_than_places(tiny_server: Server, client: OpenAI) -> None:
    """A list is computed in portions, and leaves nothing behind."""
    reply = client.embeddings.create(model="tiny-llama", input=[f"line {i % 7}" for i in range(300)])
    assert len(reply.data) == 300
    assert reply.data[299].embedding == pytest.approx(reply.data[5].embedding, abs=1e-4)
    tiny_server.wait_empty()


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"input": []}, "input"),
        ({"input": [1, "a"]}, "input.1"),
        ({"input": ["a", [1]]}, "input.1"),
        ({"input": [[]]}, "input"),
        ({"input": ["a", ""]}, "input.1"),
        ({"input": ["a", "\ud800"]}, "input.1"),
        ({"input": [[1], [49_152]]}, "input.1"),
        ({"input": ["a", "word " * 600]}, "input.1"),
        ({"input": ["a"] * 2049}, "input"),
        ({"input": "a", "dimensions": 65}, "dimensions"),
        ({"input": "a", "dimensions": 0}, "dimensions"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format"),
        ({"input": "a", "pooling": "cls"}, "pooling"),
        ({"input": "a", "normalize": False}, "normalize"),
        ({"input": "a", "input_type": "query"}, "input_type"),
        ({"input": "a", "truncate_prompt_tokens": 4}, "truncate_prompt_tokens"),
        ({"input": "a", "encoding": "float"}, "encoding"),
    ],
)
def test_what_cannot_be_embedded(tiny_server: Server, body: dict[str, Any], param: str) -> None:
    content = json.dumps(body).encode()
    reply = tiny_server.http.post("/v1/embeddings", content=content, headers={"Content-Type": "application/json"})
    assert reply.status_code == 400, reply.text
    assert error_of(reply)["param"] == param


def test_what_asks_for_nothing(tiny_server: Server) -> None:
    fields = {"user": "u", "dimensions": None, "truncate_prompt_tokens": None, "normalize": True, "input_type": None}
    reply = tiny_server.post("/v1/embeddings", {"input": "a", "model": "tgi"} | fields)
    assert reply.status_code == 200, reply.text


def test_a_client_that_waits_no_longer(tiny_server: Server, client: OpenAI) -> None:
    with pytest.raises(Exception, match="within its time"):
        client.embeddings.create(model="tiny-llama", input=["word " * 450] * 256, extra_body={"timeout_ms": 1})
    tiny_server.wait_empty()


def test_wrong_kinds_are_the_clients_own_error(client: OpenAI) -> None:
    with pytest.raises(BadRequestError, match="input"):
        client.embeddings.create(model="tiny-llama", input=[])
