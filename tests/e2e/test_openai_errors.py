"""The official `openai` package: soft prompts as models, and every refusal as one of its exception classes."""

from __future__ import annotations

import contextlib
import itertools
import json
import socket
from collections.abc import Iterator
from typing import Any

import openai
import psutil
import pytest
from openai import OpenAI

from softbatch.prompt_store.manifest import ModelSpec
from tests.e2e.conftest import StartServer
from tests.support.models import Reference, make_soft_prompt, save_prompt
from tests.support.openai_requests import MESSAGES, PROMPT, chat_ids, client_of, greedy_text
from tests.support.servers import Server, wait_for

SOFT_PROMPT = "openai-manual"
NUMBERS = itertools.count(3)


@pytest.fixture(scope="module")
def client(tiny_server: Server) -> Iterator[OpenAI]:
    with client_of(tiny_server) as client:
        yield client


@pytest.fixture(scope="module")
def soft_prompt(tiny_server: Server, tiny_spec: ModelSpec, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    prompt = make_soft_prompt("embeddings", 21, tiny_spec, scale=0.5)
    path = save_prompt(prompt, tmp_path_factory.mktemp("soft-prompts"), "manual")
    assert tiny_server.upload(SOFT_PROMPT, path).status_code == 201
    yield prompt
    assert tiny_server.http.delete(f"/v1/soft_prompts/{SOFT_PROMPT}").status_code == 200


class TestSoftPrompts:
    def test_as_model_and_as_field(self, client: OpenAI, tiny_llama: Reference, soft_prompt: Any) -> None:
        ids = tiny_llama.tokenizer(PROMPT)["input_ids"]
        expected = greedy_text(tiny_llama, ids, 12, soft_prompt)
        assert expected != greedy_text(tiny_llama, ids, 12)
        ask: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 12, "temperature": 0}
        named = client.completions.create(model=SOFT_PROMPT, **ask)
        field = client.completions.create(model="tiny-llama", **ask, extra_body={"soft_prompt": SOFT_PROMPT})
        assert named.choices[0].text == field.choices[0].text == expected
        assert named.model == SOFT_PROMPT
        assert named.usage is not None
        assert named.usage.prompt_tokens == 21 + len(ids)
        assert named.usage.prompt_tokens_details is not None
        assert named.usage.prompt_tokens_details.cached_tokens == 21

    def test_chat(self, client: OpenAI, tiny_llama: Reference, soft_prompt: Any) -> None:
        reply = client.chat.completions.create(model=SOFT_PROMPT, messages=MESSAGES, max_tokens=12, temperature=0)
        expected = greedy_text(tiny_llama, chat_ids(tiny_llama), 12, soft_prompt)
        assert reply.choices[0].message.content == expected

    @pytest.mark.usefixtures("soft_prompt")
    def test_models_name_their_parent(self, client: OpenAI) -> None:
        models = {model.id: model.model_dump() for model in client.models.list()}
        assert next(iter(models)) == "tiny-llama"
        assert models["tiny-llama"]["parent"] is None
        assert models[SOFT_PROMPT]["parent"] == models[SOFT_PROMPT]["root"] == "tiny-llama"
        assert client.models.retrieve(SOFT_PROMPT).id == SOFT_PROMPT
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("nobody")

    @pytest.mark.usefixtures("soft_prompt")
    def test_a_taken_name_is_a_conflict(self, client: OpenAI) -> None:
        with pytest.raises(openai.ConflictError) as caught:
            client.post(
                "/soft_prompts",
                cast_to=object,
                body={"name": SOFT_PROMPT},
                files=[("file", ("x.safetensors", b"anything"))],
                options={"headers": {"Content-Type": "multipart/form-data"}},
            )
        assert (caught.value.param, caught.value.code) == ("name", "name_taken")


class TestErrors:
    def test_bad_request(self, client: OpenAI) -> None:
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(model="tiny-llama", prompt=PROMPT, temperature=3)
        assert caught.value.status_code == 400
        assert (caught.value.param, caught.value.type) == ("temperature", "invalid_request_error")
        assert "less than or equal to 2" in caught.value.message

    def test_a_stream_is_refused_before_it_begins(self, client: OpenAI) -> None:
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model="tiny-llama", messages=MESSAGES, stream=True, max_tokens=10**6)
        assert caught.value.code == "context_length_exceeded"

    def test_unknown_model(self, client: OpenAI) -> None:
        with pytest.raises(openai.NotFoundError) as caught:
            client.chat.completions.create(model="gpt-nowhere", messages=MESSAGES)
        assert (caught.value.param, caught.value.code) == ("model", "model_not_found")
        assert "gpt-nowhere" in caught.value.message

    def test_key_queue_and_engine(self, start_server: StartServer, tiny_flags: tuple[str, ...]) -> None:
        """One slot, no queue, one key: every refusal that is not the request's own fault."""
        server = start_server(*tiny_flags, "--api-key", "right-key", "--max-batch-size", "1", "--max-queue-size", "0")
        ask: dict[str, Any] = {"model": "tiny-llama", "prompt": PROMPT, "max_tokens": 4}
        for key in ("wrong-key", "right-key2", "right-ke"):
            with client_of(server, api_key=key) as client, pytest.raises(openai.AuthenticationError) as refused:
                client.models.list()
            assert refused.value.code == "invalid_api_key"
        with client_of(server, api_key="right-key") as client:
            assert client.completions.create(**ask).choices[0].text
            with client.completions.create(
                **ask | {"max_tokens": 16000}, stream=True, extra_body={"ignore_eos": True}
            ) as stream:
                next(iter(stream))
                with pytest.raises(openai.RateLimitError) as full:
                    client.completions.create(**ask)
                assert full.value.code == "rate_limit_exceeded"
                assert 1 <= int(full.value.response.headers["retry-after"]) <= 60
            server.wait_empty()
            for route, kind in (
                ("/v1/completions", "guided_regex"),
                ("/v1/chat/completions", "guided_json"),
                ("/generate_stream", "regex"),
            ):
                # A busy machine may be at the end of the compilation's time first; whoever held the place until then
                # would hold it each time.
                assert any(leaves_a_place(client, server, route, kind) for _ in range(5)), (
                    "who has left holds its place"
                )
            server.engine().kill()
            assert client.completions.create(**ask).choices[0].text, "it waits for the next engine"


def is_full(server: Server) -> bool:
    """Found out by what takes no place itself."""
    return server.http.post("/v1/completions", content=b"no JSON").status_code == 429


def leaves_a_place(client: OpenAI, server: Server, route: str, kind: str) -> bool:
    """Ask for a stream whose format is not compiled meanwhile, and close the connection: whether others are let in
    while it still waits for the compiler, which stands still."""
    ask: dict[str, Any] = {"model": "tiny-llama", "prompt": PROMPT, "max_tokens": 4}
    # What is known needs no compiler.
    assert client.completions.create(**ask, extra_body={"guided_choice": [f"a{next(NUMBERS)}"]}).choices[0].text
    compiler = server.child("softbatch.server.requests.grammar_checker")
    compiler.suspend()
    number = next(NUMBERS)
    wanted = {"type": "string", "minLength": number} if kind == "guided_json" else f"[a-z]{{{number}}}"
    asked = {"stream": True, kind: wanted}
    body = {
        "/v1/completions": {"prompt": PROMPT, **asked},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": PROMPT}], **asked},
        "/generate_stream": {
            "inputs": PROMPT,
            "parameters": {"grammar": {"type": kind, "value": wanted}},
        },
    }[route]
    content = json.dumps(body).encode()
    fields = {"Host": "x", "Content-Type": "application/json", "Content-Length": len(content), **server.headers}
    head = "\r\n".join([f"POST {route} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items())])
    with socket.create_connection(("127.0.0.1", server.port)) as leaving:
        leaving.sendall(f"{head}\r\n\r\n".encode() + content)
        wait_for(lambda: is_full(server), "it takes no place")
    wait_for(lambda: not is_full(server), "the place is not given back")
    assert client.completions.create(**ask).choices[0].text
    still_waits = compiler.is_running() and compiler.status() == psutil.STATUS_STOPPED
    with contextlib.suppress(psutil.NoSuchProcess):
        compiler.kill()
    return still_waits
