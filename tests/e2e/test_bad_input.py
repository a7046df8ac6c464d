"""Whatever a client sends: a clear 4xx that names the field, and an engine that has not noticed."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from tests.support.models import TINY_VOCAB
from tests.support.servers import Server, error_of

COMPLETE, CHAT, GENERATE, STREAM = "/v1/completions", "/v1/chat/completions", "/generate", "/generate_stream"
UPLOAD = "/v1/soft_prompts"
PROMPT = "Is the sea"
USER = [{"role": "user", "content": "hello"}]


@pytest.fixture(autouse=True)
def engine_is_untouched(untouched_engine: None) -> None:
    """After every case of this file."""


def completion(**fields: Any) -> tuple[str, Any]:
    return COMPLETE, {"prompt": PROMPT, "max_tokens": 2} | fields


def chat(**fields: Any) -> tuple[str, Any]:
    return CHAT, {"messages": USER, "max_tokens": 2} | fields


def generate(**parameters: Any) -> tuple[str, Any]:
    return GENERATE, {"inputs": PROMPT, "parameters": {"max_new_tokens": 2} | parameters}


LONG_TEXT = "a very long story " * 400
HUGE_TEXT = "x" * 2_000_000
# What is sent, the field at fault, and a part of the message.
BAD_FIELDS: dict[str, tuple[tuple[str, Any], str | None, str]] = {
    # wrong types
    "text as number": (completion(max_tokens="many"), "max_tokens", "valid integer"),
    "number as text": (completion(temperature="hot"), "temperature", "valid number"),
    "true is no number": (completion(n=True), "n", "valid integer"),
    "1.5 tokens": (completion(max_tokens=1.5), "max_tokens", "integer"),
    "prompt as object": (completion(prompt={"text": PROMPT}), "prompt", "must be a text"),
    "prompt as number": (completion(prompt=3), "prompt", "must be a text"),
    "mixed prompts": (completion(prompt=["a", 3]), "prompt.1", "must be a text"),
    "stop as number": (completion(stop=3), "stop", "list"),
    "stream as text": (completion(stream="yes"), "stream", "boolean"),
    "messages as text": (chat(messages="hello"), "messages", "list"),
    "message as text": (chat(messages=["hello"]), "messages.0", "object"),
    "content as number": (chat(messages=[{"role": "user", "content": 3}]), "messages.0.content", "must be a text"),
    "content missing": (chat(messages=[{"role": "user"}]), "messages.0.content", "required"),
    "unknown role": (chat(messages=[{"role": "king", "content": "x"}]), "messages.0.role", "'system'"),
    "image part": (
        chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
        "messages.0.content.0.type",
        "only 'text'",
    ),
    "no messages": (chat(messages=[]), "messages", "at least one"),
    "prompt missing": ((COMPLETE, {"max_tokens": 2}), "prompt", "required"),
    "inputs missing": ((GENERATE, {"parameters": {}}), "inputs", "required"),
    "parameters as list": ((GENERATE, {"inputs": "x", "parameters": [1]}), "parameters", "object"),
    "inputs as list": ((GENERATE, {"inputs": ["x"]}), "inputs", "valid string"),
    # out of range
    "huge integer": (completion(max_tokens=10**400), "max_tokens", "less than or equal"),
    "2**63 tokens": (completion(max_tokens=2**63), "max_tokens", "less than or equal"),
    "2**63 as seed": (completion(seed=2**63), "seed", "less than or equal"),
    "huge seed": (generate(seed=10**400), "parameters.seed", "less than or equal"),
    "2**63 choices": (completion(n=2**63), "n", "less than or equal"),
    "huge top_k": (completion(top_k=10**400), "top_k", "less than or equal"),
    "huge temperature": (completion(temperature=10**400), "temperature", "valid number"),
    "huge priority": (completion(priority=2**63), "priority", "less than or equal"),
    "no tokens": (chat(max_tokens=0), "max_tokens", "greater than or equal to 1"),
    "negative tokens": (completion(max_tokens=-1), "max_tokens", "greater than or equal to 0"),
    "negative temperature": (completion(temperature=-0.1), "temperature", "greater than or equal to 0"),
    "negative top_p": (completion(top_p=-1), "top_p", "greater than or equal to 0"),
    "top_p beyond 1": (generate(top_p=1.5), "parameters.top_p", "less than or equal to 1"),
    "more at least than at most": (completion(min_tokens=3), "min_tokens", "max_tokens (2)"),
    "more at least than fits": (chat(min_tokens=600, max_tokens=None), "min_tokens", "room"),
    "negative penalty": (completion(repetition_penalty=-1), "repetition_penalty", "greater than"),
    "too many logprobs": (completion(logprobs=21), "logprobs", "less than or equal to 20"),
    "too many choices": (completion(n=17), "n", "less than or equal to 16"),
    "too many prompts": (completion(prompt=["x"] * 65), "prompt", "at most 64"),
    "prompts times n": (completion(prompt=["x"] * 33, n=2), "n", "at most 64"),
    "negative new tokens": (generate(max_new_tokens=-5), "parameters.max_new_tokens", "greater than or equal to 1"),
    # prompts
    "empty prompt": (completion(prompt=""), "prompt", "empty"),
    "no token ids": (completion(prompt=[]), "prompt", "must be a text"),
    "empty list in a list": (completion(prompt=[[1, 2], []]), "prompt", "empty"),
    "empty inputs": ((GENERATE, {"inputs": ""}), "inputs", "empty"),
    "prompt of too many tokens": (completion(prompt=LONG_TEXT), "prompt", "longest sequence of 512 tokens"),
    "prompt of too many ids": (completion(prompt=[5] * 513), "prompt", "longest sequence of 512 tokens"),
    "prompt of too many characters": (completion(prompt=HUGE_TEXT), "prompt", "2000000 characters"),
    "inputs of too many tokens": ((GENERATE, {"inputs": LONG_TEXT}), "inputs", "longest sequence of 512 tokens"),
    "inputs of too many characters": ((STREAM, {"inputs": HUGE_TEXT}), "inputs", "2000000 characters"),
    "chat of too many tokens": (chat(messages=[{"role": "user", "content": LONG_TEXT}]), "messages", "512 tokens"),
    "chat of too many characters": (
        chat(messages=[{"role": "user", "content": HUGE_TEXT}]),
        "messages",
        "characters",
    ),
    "more output than fits": (completion(max_tokens=511), "max_tokens", "longest sequence of 512 tokens"),
    "more chat than fits": (chat(max_completion_tokens=600, max_tokens=600), "max_completion_tokens", "512 tokens"),
    "more of the older name": (chat(max_tokens=600), "max_tokens", "512 tokens"),
    "more new tokens than fit": (generate(max_new_tokens=600), "parameters.max_new_tokens", "512 tokens"),
    "token id out of range": (completion(prompt=[1, TINY_VOCAB]), "prompt", f"0 to {TINY_VOCAB - 1}"),
    "negative token id": (completion(prompt=[1, -1]), "prompt.1", "token id"),
    "huge token id": (completion(prompt=[2**63]), "prompt.0", "token id"),
    "detokenize out of range": (("/detokenize", {"tokens": [TINY_VOCAB]}), "tokens.0", f"0 to {TINY_VOCAB - 1}"),
    "lone surrogate": (completion(prompt="\ud800"), "prompt", "surrogate"),
    # stop strings
    "10,000 stop strings": (completion(stop=["x"] * 10_000), "stop", "at most 16"),
    "10,000 stop sequences": (generate(stop=["x"] * 10_000), "parameters.stop", "at most 16"),
    "stop string of 100,000 characters": (completion(stop="x" * 100_000), "stop.0", "at most 256"),
    "a number as a stop string": (completion(stop=["ok", 5]), "stop.1", "valid string"),
    "10,000 stop tokens": (completion(stop_token_ids=[1] * 10_000), "stop_token_ids", "at most 64"),
    # not supported, by name
    "tools": (chat(tools=[{"type": "mcp"}]), "tools.0.type", "only 'function'"),
    "JSON mode misspelt": (chat(response_format={"type": "jsonobject"}), "response_format.type", "'json_object'"),
    "JSON schema without an end": (
        chat(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "#/x"}}}),
        "response_format.json_schema.schema",
        "does not exist",
    ),
    "suffix": (completion(suffix="the end"), "suffix", "not supported"),
    "grammar": (generate(grammar={"type": "regex", "value": "(a"}), "parameters.grammar.value", "unclosed"),
    "watermark": (generate(watermark=True), "parameters.watermark", "not supported"),
    "stream where there is none": ((GENERATE, {"inputs": "x", "stream": True}), "stream", "not supported"),
    # not known
    "temperatur": (completion(temperatur=0.5), "temperatur", "did you mean 'temperature'?"),
    "max_new_token": (generate(max_new_token=5), "parameters.max_new_token", "did you mean 'max_new_tokens'?"),
    "nonsense": (chat(zzzzzz=1), "zzzzzz", "unknown field"),
    "a name of 100,000 characters": (chat(**{"y" * 100_000: 1}), "y" * 256, "unknown field"),
    # contradictions
    "stream_options alone": (completion(stream_options={"include_usage": True}), "stream_options", "'stream': true"),
    "top_logprobs alone": (chat(top_logprobs=3), "top_logprobs", "'logprobs': true"),
    "two lengths": (chat(max_completion_tokens=3), "max_tokens", "only one"),
}


@pytest.mark.parametrize("case", BAD_FIELDS)
def test_bad_fields(tiny_server: Server, case: str) -> None:
    (route, body), param, message = BAD_FIELDS[case]
    reply = tiny_server.http.post(route, content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert reply.status_code == 400, reply.text[:500]
    error = error_of(reply)
    assert (error["param"], error["type"]) == (param, "invalid_request_error"), error
    assert message in error["message"], error
    assert len(reply.content) < 2000, "what was sent is echoed"


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize(
    ("route", "body", "param"),
    [
        (COMPLETE, '{"prompt": "x", "temperature": %s}', "temperature"),
        (CHAT, '{"messages": [{"role": "user", "content": "x"}], "top_p": %s}', "top_p"),
        (GENERATE, '{"inputs": "x", "parameters": {"repetition_penalty": %s}}', "parameters.repetition_penalty"),
    ],
)
def test_numbers_that_are_none(tiny_server: Server, route: str, body: str, param: str, number: str) -> None:
    reply = post_raw(tiny_server, route, body % number)
    assert reply.status_code == 400
    error = error_of(reply)
    # Either no JSON at all, or refused by the field.
    assert (error["code"], error["param"]) in (("invalid_json", None), ("finite_number", param)), error


def test_a_finite_number_beyond_64_bits(tiny_server: Server) -> None:
    """Longer than Python reads at once (4300 digits), and not to be converted at all."""
    for digits in (400, 5000, 1_000_000):
        reply = post_raw(tiny_server, COMPLETE, '{"prompt": "x", "max_tokens": %s}' % ("9" * digits))
        assert reply.status_code == 400
        error = error_of(reply)
        assert error["param"] == "max_tokens" or error["code"] == "invalid_json", error


def post_raw(server: Server, route: str, body: str | bytes, content_type: str = "application/json") -> httpx.Response:
    return server.http.post(route, content=body, headers={"Content-Type": content_type})


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "invalid_body"),
        (b"hello", "invalid_json"),
        (b'{"prompt": "x"', "invalid_json"),
        (b'{"prompt": "\xff\xfe"}', "invalid_json"),
        (b"\x80\x04\x95\x05", "invalid_json"),
        (b"[1, 2, 3]", "invalid_body"),
        (b'"text"', "invalid_body"),
        (b"null", "invalid_body"),
        (b"[" * 200_000 + b"]" * 200_000, "invalid_json"),
        (b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "invalid_json"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "invalid_json"),
    ],
    ids=["empty", "text", "cut off", "not UTF-8", "binary", "list", "string", "null", "deep", "deep prompt", "objects"],
)
@pytest.mark.parametrize("route", [COMPLETE, CHAT, GENERATE])
def test_bodies_that_are_no_request(tiny_server: Server, route: str, body: bytes, code: str) -> None:
    reply = post_raw(tiny_server, route, body)
    assert reply.status_code == 400, reply.text
    assert error_of(reply)["code"] == code
    assert "JSON" in error_of(reply)["message"]


def test_other_content_types(tiny_server: Server) -> None:
    form = tiny_server.http.post(COMPLETE, data={"prompt": "x"})
    assert form.status_code == 400
    assert "Content-Type: application/json" in error_of(form)["message"]
    upload = tiny_server.post(UPLOAD, {"name": "x"})
    assert upload.status_code == 400
    assert "multipart/form-data" in error_of(upload)["message"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "model", ["gpt-5", "../x", "a/b", "..", "/etc/passwd", "x" * 200, "tiny-llama\n", "TINY-LLAMA"]
)
def test_unknown_models(tiny_server: Server, model: str, stream: bool) -> None:
    for route, body in (completion(model=model, stream=stream), chat(model=model, stream=stream)):
        reply = tiny_server.post(route, body)
        assert reply.status_code == 404
        error = error_of(reply)
        assert (error["param"], error["code"]) == ("model", "model_not_found")
        assert "GET /v1/models" in error["message"]
    reply = tiny_server.post(COMPLETE, completion(soft_prompt=model)[1])
    assert reply.status_code == 404
    assert error_of(reply)["param"] == "soft_prompt"
    reply = tiny_server.post(*generate(soft_prompt=model))
    assert reply.status_code == 404
    assert error_of(reply)["param"] == "parameters.soft_prompt"
    assert error_of(reply)["code"] == "soft_prompt_not_found"


def test_names_that_are_no_names(tiny_server: Server) -> None:
    for field, name, message in (("soft_prompt", "", "at least 1"), ("model", "x" * 257, "at most 256")):
        reply = tiny_server.post(*completion(**{field: name}))
        assert reply.status_code == 400
        assert error_of(reply)["param"] == field
        assert message in error_of(reply)["message"]


@pytest.mark.parametrize("model", ["", "tgi", "dummy"])
def test_placeholders_mean_the_base_model(tiny_server: Server, model: str) -> None:
    for route, body in (completion(model=model), chat(model=model), (GENERATE, {"inputs": PROMPT, "model": model})):
        assert tiny_server.post(route, body).status_code == 200
    assert tiny_server.post(GENERATE, {"inputs": PROMPT, "model": "tgl"}).status_code == 404


@pytest.mark.parametrize(
    ("method", "path", "status", "told"),
    [
        ("POST", "/v1/complete", 404, "GET /docs"),
        ("GET", "/nowhere/../v1", 404, "GET /docs"),
        ("POST", "/v2/completions", 404, "did you mean /v1/completions?"),
        ("POST", "/v1/v1/chat/completions", 404, "did you mean /v1/chat/completions?"),
        ("GET", COMPLETE, 405, "allowed: POST"),
        ("DELETE", "/v1/queue", 405, "allowed: "),
        ("PUT", "/v1/soft_prompts/x", 405, "allowed: "),
        ("POST", "/metrics", 405, "allowed: "),
    ],
)
def test_routes_that_are_not_there(tiny_server: Server, method: str, path: str, status: int, told: str) -> None:
    reply = tiny_server.http.request(method, path)
    assert reply.status_code == status
    error = error_of(reply)
    assert error["type"] == "invalid_request_error"
    assert method in error["message"]
    assert told in error["message"]


def test_over_the_limit_for_json(tiny_server: Server) -> None:
    reply = post_raw(tiny_server, COMPLETE, json.dumps({"prompt": "x" * (9 << 20)}))
    assert reply.status_code == 413
    assert "larger than the 8 MiB" in error_of(reply)["message"]
