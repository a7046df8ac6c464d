"""Request bodies: what is understood, and how everything else is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from softbatch.server.http.errors import install_handlers, validation_error
from softbatch.server.schemas.chat import ChatChunkChoice, ChatCompletionChunk, ChatCompletionRequest, ChatDelta
from softbatch.server.schemas.completions import CompletionRequest
from softbatch.server.schemas.generate import (
    CompatGenerateRequest,
    GenerateParameters,
    GenerateRequest,
    GenerateStreamRequest,
)
from softbatch.server.schemas.messages import MessagesRequest
from softbatch.server.schemas.responses import ResponsesRequest
from softbatch.server.schemas.score import ScoreRequest
from softbatch.server.schemas.tokenize import DetokenizeRequest, TokenizeRequest
from softbatch.server.version import VERSION

HELLO = [{"role": "user", "content": "Hello"}]
BEGUN = [{"role": "assistant", "content": "The answer is", "prefix": True}]


def tool(name: str, **fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name} | fields}


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def deep(levels: int) -> Any:
    value: Any = {}
    for _ in range(levels):
        value = {"properties": {"a": value}}
    return value


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    """Every schema behind a route that does nothing: errors take the very way they take in the server."""
    app = FastAPI()
    install_handlers(app)

    @app.post("/completions")
    def completions(body: CompletionRequest) -> None: ...

    @app.post("/chat")
    def chat(body: ChatCompletionRequest) -> None: ...

    @app.post("/generate")
    def generate(body: GenerateRequest) -> None: ...

    @app.post("/generate_stream")
    def generate_stream(body: GenerateStreamRequest) -> None: ...

    @app.post("/compat")
    def compat(body: CompatGenerateRequest) -> None: ...

    @app.post("/tokenize")
    def tokenize(body: TokenizeRequest) -> None: ...

    @app.post("/score")
    def score(body: ScoreRequest) -> None: ...

    @app.post("/detokenize")
    def detokenize(body: DetokenizeRequest) -> None: ...

    with TestClient(app) as client:
        yield client


def post(client: TestClient, route: str, body: Any) -> Any:
    """`body` may be JSON text; Python's own dialect of JSON has NaN and Infinity."""
    content = body if isinstance(body, str | bytes) else json.dumps(body)
    return client.post(route, content=content, headers={"content-type": "application/json"})


def error_of(client: TestClient, route: str, body: Any) -> dict[str, Any]:
    reply = post(client, route, body)
    assert reply.status_code == 400, reply.text
    if route in ("/generate", "/generate_stream"):
        body: dict[str, Any] = reply.json()
        assert set(body) == {"error", "error_type", "param", "code"}
        assert body["error_type"] == "validation"
        return {"message": body["error"], "param": body["param"], "code": body["code"]}
    error: dict[str, Any] = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert len(error["message"]) <= 1000
    return error


def completion(**fields: Any) -> dict[str, Any]:
    return {"prompt": "Hello", **fields}


def chat(**fields: Any) -> dict[str, Any]:
    return {"messages": HELLO, **fields}


def generate(**parameters: Any) -> dict[str, Any]:
    return {"inputs": "Hello", "parameters": parameters}


@pytest.mark.parametrize(
    ("route", "body"),
    [
        ("/completions", completion()),
        ("/completions", completion(prompt=[1, 2, 3])),
        ("/completions", completion(prompt=["a", "b"], n=16, best_of=16)),
        ("/completions", completion(prompt=[[1], [2, 3]])),
        ("/completions", completion(temperature=0, top_p=1, seed=-1, stop="x", logprobs=20, logit_bias={})),
        ("/completions", completion(max_tokens=0, echo=True, logprobs=20)),
        ("/completions", completion(max_tokens=0, prompt_logprobs=20, n=2)),
        ("/completions", completion(stream=True, prompt_logprobs=False, echo=True, logprobs=0)),
        ("/completions", completion(best_of=1, n=2, suffix=None, echo=True, min_tokens=0, top_k=-1)),
        ("/completions", completion(stream=True, stream_options={"include_usage": True})),
        ("/completions", completion(stop=["a"] * 16, stop_token_ids=[0] * 64, ignore_eos=True)),
        ("/completions", completion(user="u", model=None, temperature=None, stop=None, logit_bias=None)),
        ("/chat", chat()),
        (
            "/chat",
            chat(messages=[{"role": "system", "content": [{"type": "text", "text": "Be brief."}]}, *HELLO]),
        ),
        ("/chat", chat(logprobs=True, top_logprobs=20, max_tokens=5, max_completion_tokens=5)),
        # Numbers of languages that have but one kind.
        ("/chat", chat(max_tokens=5.0, n=1.0, seed=-7.0, top_k=40.0, temperature=1, logit_bias={"5": 1})),
        ("/generate", generate(max_new_tokens=5.0, seed=2**64 - 1, top_n_tokens=0.0)),
        ("/chat", chat(tools=[tool("f", strict=None, parameters=None)], tool_choice="auto", parallel_tool_calls=None)),
        ("/chat", chat(tools=[tool("a-b.c"), tool("g")], tool_choice=named("g"))),
        ("/chat", chat(tools=[tool("g")], tool_choice="any")),
        ("/chat", chat(tools=[{"function": {"name": "g"}, "cache_control": {"type": "ephemeral"}}])),
        ("/chat", chat(response_format={"type": "json_schema", "name": "a", "strict": True, "schema": {}})),
        (
            "/chat",
            chat(
                tools=[tool("f")],
                tool_choice={"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [named("f")]}},
            ),
        ),
        (
            "/chat",
            chat(
                messages=[
                    *HELLO,
                    {
                        "role": "assistant",
                        "content": None,
                        "tool_calls": [{"id": "1", "index": 0, **tool("f", arguments="")}],
                    },
                    {"role": "tool", "tool_call_id": "1", "content": None, "name": "f"},
                    {
                        "role": "assistant",
                        "content": "x",
                        "reasoning_content": "y",
                        "tool_calls": [],
                        "function_call": None,
                    },
                ]
            ),
        ),
        ("/chat", chat(reasoning_effort="low", chat_template_kwargs={"enable_thinking": False})),
        ("/chat", chat(enable_thinking=True, thinking={"type": "enabled", "budget_tokens": 100})),
        ("/chat", chat(enable_thinking=False, thinking={"type": "auto"}, reasoning_effort="none")),
        ("/chat", chat(stop=["", None], max_tokens=-1, bad_words=[])),
        ("/chat", chat(messages=[*HELLO, {"role": "assistant", "content": None}, *HELLO])),
        (
            "/chat",
            chat(
                messages=[
                    {"role": "user", "content": ["Hello", {"type": "input_text", "text": "you"}]},
                    {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
                ]
            ),
        ),
        (
            "/chat",
            chat(response_format={"type": "json_schema", "value": {"name": "a", "schema": {"type": "object"}}}),
        ),
        # What the web page of llama.cpp sends unasked, and what others have as their default.
        (
            "/chat",
            chat(
                cache_prompt=True,
                reasoning_format="auto",
                dynatemp_range=0,
                dynatemp_exponent=1,
                typ_p=1,
                xtc_probability=0,
                xtc_threshold=0.1,
                repeat_last_n=64,
                repeat_penalty=1,
                dry_multiplier=0,
                dry_base=1.75,
                dry_allowed_length=2,
                dry_penalty_last_n=-1,
                timings_per_token=True,
                keep_alive="5m",
                include_reasoning=True,
                separate_reasoning=True,
                stream_reasoning=True,
            ),
        ),
        ("/chat", chat(tools=[], tool_choice="none", functions=None, response_format={"type": "text"})),
        ("/chat", chat(modalities=["text"], audio=None, parallel_tool_calls=True, reasoning_effort=None)),
        (
            "/chat",
            chat(user="u", metadata={"a": "b"}, store=False, service_tier="auto", safety_identifier="s"),
        ),
        (
            # What the openai package gives back of an earlier answer.
            "/chat",
            chat(
                messages=[
                    {
                        "role": "assistant",
                        "content": "Hi",
                        "refusal": None,
                        "annotations": None,
                        "audio": None,
                        "function_call": None,
                        "tool_calls": None,
                    }
                ]
            ),
        ),
        # What clients put into a turn besides its role and its text.
        *(
            ("/chat", chat(messages=[HELLO[0] | extra]))
            for extra in (
                {"type": "text"},
                {"type": "message", "id": "msg_1", "status": "completed"},
                {"name": "Ann"},
                {"id": 4, "opts": {"visible": True}, "cycle": 1},
                {"cache_control": {"type": "ephemeral"}},
                {"reasoning": None, "reasoning_content": None, "refusal": "", "annotations": [], "audio": None},
                {"tool_calls": [], "function_call": None, "additional_kwargs": {}, "example": False},
                {"content": [{"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}, "annotations": []}]},
            )
        ),
        # What asks for nothing.
        (
            "/chat",
            chat(top_p=0, top_k=0, n=1, best_of=1, presence_penalty=0, logit_bias={}, stop="", stop_token_ids=[]),
        ),
        ("/chat", chat(tools=[], tool_choice="auto", modalities=["text"], verbosity="medium", think=False, extra={})),
        (
            "/chat",
            chat(stream=False, stream_options={"include_usage": False}, typical_p=1, mirostat=0, repeat_penalty=1),
        ),
        (
            "/chat",
            chat(
                stream=True,
                stream_options={"include_usage": True, "continuous_usage_stats": True, "include_obfuscation": False},
            ),
        ),
        ("/chat", chat(messages=[*HELLO, *BEGUN], response_format={"type": "json_object"})),
        ("/chat", chat(prediction={"type": "content", "content": "def f():"}, web_search_options=None)),
        # What programs for several servers send unasked.
        *(
            (route, body(**sampler))
            for route, body in (("/chat", chat), ("/completions", completion), ("/generate", generate))
            for sampler in (
                {"min_keep": 0, "nsigma": 0, "skew": 0, "dynamic_temperature": False, "dynatemp_low": 1},
                {
                    "encoder_repetition_penalty": 1,
                    "min_length": 0,
                    "repetition_penalty_range": 0,
                    "add_bos_token": True,
                },
                {"logit_bias": [], "typical_p": "", "use_beam_search": {}},
            )
        ),
        ("/completions", completion(logprobs=False, min_tokens=16, ignore_eos=True, skip_special_tokens=True)),
        (
            "/generate_stream",
            generate(
                best_of=1,
                decoder_input_details=False,
                top_n_tokens=None,
                grammar=None,
                return_full_text=None,
                typical_p=1,
                watermark=False,
                truncate=None,
                adapter_id=None,
                top_p=0,
                top_k=-1,
                temperature=0,
                do_sample=None,
                seed=None,
                stop=None,
                repetition_penalty=None,
                ignore_eos_token=False,
                presence_penalty=0,
            ),
        ),
        ("/generate", {"inputs": "Hello", "options": {"use_cache": False}}),
        ("/generate", {"inputs": "Hello"}),
        ("/generate", {"inputs": "Hello", "parameters": None, "stream": False}),
        ("/generate_stream", {"inputs": "Hello", "stream": True}),
        ("/compat", {"inputs": "Hello", "stream": True}),
        # What huggingface_hub's client sends.
        ("/compat", {**generate(watermark=False, decoder_input_details=False, best_of=1), "stream": False}),
        ("/generate", generate(soft_prompt="a", adapter_id="a", truncate=3, stop=["x"], seed=2**63 - 1)),
        ("/tokenize", {"prompt": ""}),
        ("/tokenize", {"messages": HELLO, "add_generation_prompt": True}),
        ("/detokenize", {"tokens": [], "model": "m"}),
    ],
)
def test_accepts(client: TestClient, route: str, body: Any) -> None:
    reply = post(client, route, body)
    assert reply.status_code == 200, reply.text


@pytest.mark.parametrize(
    ("route", "body", "param", "says"),
    [
        # ranges and types
        ("/completions", completion(temperature=2.1), "temperature", "less than or equal to 2"),
        ("/completions", completion(temperature="1"), "temperature", "valid number"),
        ("/completions", completion(temperature=True), "temperature", "valid number"),
        ("/completions", completion(n=True), "n", "valid integer"),
        ("/completions", completion(n=1.5), "n", "integer"),
        ("/completions", completion(n=17), "n", "less than or equal to 16"),
        ("/completions", completion(n=0), "n", "greater than or equal to 1"),
        ("/completions", completion(max_tokens=-1), "max_tokens", "greater than or equal to 0"),
        ("/completions", completion(max_tokens=2**31), "max_tokens", "less than or equal to 2147483647"),
        ("/completions", completion(max_tokens=10**400), "max_tokens", "less than or equal to 2147483647"),
        ("/completions", completion(seed=2**63), "seed", "less than or equal to"),
        ("/completions", completion(seed=10**30), "seed", "less than or equal to"),
        ("/completions", completion(top_k=-2), "top_k", "greater than or equal to -1"),
        ("/completions", completion(top_p=-0.1), "top_p", "greater than or equal to 0"),
        ("/completions", completion(min_p=1.5), "min_p", "less than or equal to 1"),
        ("/completions", completion(presence_penalty=-3), "presence_penalty", "greater than or equal to -2"),
        ("/completions", completion(frequency_penalty=3), "frequency_penalty", "less than or equal to 2"),
        ("/completions", completion(repetition_penalty=0), "repetition_penalty", "0.01"),
        ("/completions", completion(logprobs=21), "logprobs", "less than or equal to 20"),
        ("/completions", completion(logprobs=True), "logprobs", "valid integer"),
        ("/completions", completion(priority=1001), "priority", "less than or equal to 1000"),
        ("/completions", completion(timeout_ms=0), "timeout_ms", "greater than or equal to 1"),
        ("/chat", chat(timeout_ms=1.5), "timeout_ms", "valid integer"),
        ("/chat", chat(timeout_ms=86_400_001), "timeout_ms", "less than or equal to 86400000"),
        ("/generate", generate(timeout_ms=0), "parameters.timeout_ms", "greater than or equal to 1"),
        ("/completions", completion(stream="yes"), "stream", "valid boolean"),
        (
            "/completions",
            completion(stream_options={"include_usage": True}),
            "stream_options",
            "'stream': true",
        ),
        (
            "/completions",
            completion(stream=True, stream_options={"include_usages": True}),
            "stream_options.include_usages",
            "did you mean 'include_usage'?",
        ),
        ("/completions", completion(stop=["a", 3]), "stop.1", "valid string"),
        ("/completions", completion(stop=["x" * 257]), "stop.0", "at most 256 characters"),
        ("/completions", completion(stop=["x"] * 10_000), "stop", "at most 16 stop strings"),
        ("/completions", completion(stop=5), "stop", "list"),
        ("/completions", completion(stop=["ok", 5]), "stop.1", "valid string"),
        ("/completions", completion(stop_token_ids=[1] * 65), "stop_token_ids", "at most 64"),
        ("/completions", completion(stop_token_ids=[-1]), "stop_token_ids.0", "greater than or equal to 0"),
        ("/completions", completion(soft_prompt=""), "soft_prompt", "at least 1 character"),
        ("/completions", completion(model="m" * 257), "model", "at most 256 characters"),
        ("/completions", completion(cache_salt="s" * 257), "cache_salt", "at most 256 characters"),
        # prompts
        ("/completions", {}, "prompt", "required"),
        ("/completions", completion(prompt=None), "prompt", "required"),
        ("/completions", completion(prompt=7), "prompt", "must be a text"),
        ("/completions", completion(prompt={}), "prompt", "must be a text"),
        ("/completions", completion(prompt=[]), "prompt", "must be a text"),
        ("/completions", completion(prompt=[1, -1]), "prompt.1", "integer from 0"),
        ("/completions", completion(prompt=[1, True]), "prompt.1", "integer from 0"),
        ("/completions", completion(prompt=[1, 2.0]), "prompt.1", "integer from 0"),
        ("/completions", completion(prompt=[1, 2**31]), "prompt.1", "integer from 0"),
        ("/completions", completion(prompt=[1, "a"]), "prompt.1", "integer from 0"),
        ("/completions", completion(prompt=["a", 1]), "prompt.1", "must be a text"),
        ("/completions", completion(prompt=[[1], "a"]), "prompt.1", "list of token ids"),
        ("/completions", completion(prompt=[[1], [2, None]]), "prompt.1.1", "integer from 0"),
        ("/completions", completion(prompt=["a"] * 65), "prompt", "at most 64 prompts"),
        ("/completions", completion(prompt=["a"] * 33, n=2), "n", "33 times 2"),
        ("/completions", '{"prompt": "\\ud800"}', "prompt", "surrogates"),
        ("/completions", '{"prompt": ["ok", "\\ud800"]}', "prompt.1", "surrogates"),
        # combinations and what is not supported
        ("/completions", completion(best_of=2, n=3), "best_of", "must not be less than n (3)"),
        ("/completions", completion(best_of=2, stream=True), "best_of", "not available with 'stream': true"),
        ("/completions", completion(prompt=["a"] * 33, best_of=2), "best_of", "prompts times best_of"),
        ("/completions", completion(suffix="x"), "suffix", "not supported"),
        ("/completions", completion(echo=True, logprobs=21), "logprobs", "less than or equal to 20"),
        ("/completions", completion(prompt_logprobs=21), "prompt_logprobs", "less than or equal to 20"),
        ("/completions", completion(prompt_logprobs=-1), "prompt_logprobs", "greater than or equal to 0"),
        ("/completions", completion(prompt_logprobs=True), "prompt_logprobs", "valid integer"),
        ("/completions", completion(prompt_logprobs=1, stream=True), "prompt_logprobs", "not available with 'stream'"),
        ("/completions", completion(max_tokens=0, min_tokens=1), "min_tokens", "not be more than max_tokens (0)"),
        ("/chat", chat(prompt_logprobs=1), "prompt_logprobs", "not supported"),
        ("/completions", completion(suffix="s"), "suffix", "not supported"),
        ("/completions", completion(logit_bias={"5": 101}), "logit_bias.5", "less than or equal to 100"),
        ("/completions", completion(logit_bias={"5": True}), "logit_bias.5", "valid number"),
        (
            "/chat",
            '{"messages": [{"role": "user", "content": "a"}], "logit_bias": {"5": NaN}}',
            "logit_bias.5",
            "finite",
        ),
        ("/chat", chat(logit_bias={"the": 1}), "logit_bias.the", "a key is a token id"),
        ("/chat", chat(logit_bias={"-1": 1}), "logit_bias.-1", "a key is a token id"),
        ("/chat", chat(logit_bias={"²": 1}), "logit_bias.²", "a key is a token id"),
        ("/chat", chat(logit_bias={"9" * 90: 1}), f"logit_bias.{'9' * 90}", "a key is a token id"),
        ("/chat", chat(logit_bias=[[5, 1]]), "logit_bias", "an object"),
        ("/chat", chat(logit_bias={str(i): 1 for i in range(1025)}), "logit_bias", "at most 1024"),
        ("/chat", chat(allowed_token_ids=[]), "allowed_token_ids", "at least 1"),
        ("/chat", chat(allowed_token_ids=[True]), "allowed_token_ids.0", "valid integer"),
        (
            "/chat",
            chat(allowed_token_ids=[5], response_format={"type": "json_object"}),
            "allowed_token_ids",
            "not together with response_format",
        ),
        ("/chat", chat(bad_words=[""]), "bad_words.0", "at least 1 character"),
        ("/chat", chat(bad_words=["a"] * 129), "bad_words", "at most 128"),
        ("/chat", chat(truncate_prompt_tokens=0), "truncate_prompt_tokens", "at least 1, or -1"),
        ("/chat", chat(truncate_prompt_tokens=-2), "truncate_prompt_tokens", "greater than or equal to -1"),
        ("/chat", chat(truncation_side="right"), "truncation_side", "not supported"),
        ("/chat", chat(skip_special_tokens=0), "skip_special_tokens", "valid boolean"),
        ("/chat", chat(web_search_options={}), "web_search_options", "not supported"),
        (
            "/chat",
            chat(continue_final_message=True, add_generation_prompt=True),
            "continue_final_message",
            "not together",
        ),
        ("/completions", completion(min_tokens=17), "min_tokens", "not be more than max_tokens (16)"),
        ("/chat", chat(min_tokens=3, max_completion_tokens=2), "min_tokens", "max_completion_tokens (2)"),
        ("/completions", completion(min_tokens=-1), "min_tokens", "greater than or equal to 0"),
        ("/completions", completion(typical_p=0.9), "typical_p", "send 1.0"),
        ("/completions", completion(mirostat=2), "mirostat", "send 0"),
        ("/completions", completion(repetition_penalty_range=9), "repetition_penalty_range", "send 0"),
        ("/completions", completion(best_of=1, n=1, use_beam_search=1), "use_beam_search", "send false"),
        ("/completions", completion(temperatur=1), "temperatur", "did you mean 'temperature'?"),
        ("/completions", completion(messages=HELLO), "messages", "unknown field 'messages'"),
        ("/completions", completion(**{"x" * 5000: 1}), "x" * 256, "unknown field"),
        # chat
        ("/chat", {}, "messages", "required"),
        ("/chat", chat(messages=[]), "messages", "at least one message"),
        ("/chat", chat(messages="hi"), "messages", "valid list"),
        ("/chat", chat(messages=[5]), "messages.0", "must be a JSON object"),
        ("/chat", chat(messages=HELLO * 1025), "messages", "at most 1024 items"),
        ("/chat", chat(messages=[{"role": "user"}]), "messages.0.content", "required"),
        ("/chat", chat(messages=[{"role": "user", "content": 5}]), "messages.0.content", "a text or a list"),
        (
            "/chat",
            chat(messages=[*HELLO, {"role": "function", "content": "x"}]),
            "messages.1.role",
            "'assistant'",
        ),
        ("/chat", chat(messages=[{**HELLO[0], "type": "image"}]), "messages.0.type", "not supported"),
        ("/chat", chat(messages=[{**HELLO[0], "prefix": True}]), "messages.0.prefix", "only an assistant's"),
        ("/chat", chat(messages=[*BEGUN, *HELLO]), "messages.0.prefix", "only the last"),
        ("/tokenize", {"messages": BEGUN}, "messages.0.prefix", "leave it out"),
        ("/tokenize", {"messages": [{**BEGUN[0], "prefix": False, "partial": True}]}, "messages.0.partial", "leave it"),
        ("/score", {"messages": [*HELLO, *BEGUN], "candidates": ["a"]}, "messages.1.prefix", "leave it out"),
        (
            "/chat",
            chat(messages=[{**HELLO[0], "tool_calls": [{"id": "1"}]}]),
            "messages.0.tool_calls.0.function",
            "required",
        ),
        ("/chat", chat(messages=[{**HELLO[0], "reasoning": "Hm"}]), "messages.0.reasoning", "assistant's"),
        ("/chat", chat(messages=[{**HELLO[0], "contents": "x"}]), "messages.0.contents", "'content'?"),
        (
            "/chat",
            chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
            "messages.0.content.0.type",
            "parts of type 'image_url' are not supported",
        ),
        (
            "/chat",
            chat(messages=[{"role": "user", "content": [{"type": "text"}]}]),
            "messages.0.content.0.text",
            "required",
        ),
        (
            "/chat",
            chat(messages=[{"role": "user", "content": [{"type": "text", "text": "x"}] * 65}]),
            "messages.0.content",
            "at most 64",
        ),
        (
            "/chat",
            '{"messages": [{"role": "user", "content": "\\ud800"}]}',
            "messages.0.content.0.text",
            "unicode",
        ),
        ("/chat", chat(top_logprobs=2), "top_logprobs", "'logprobs': true"),
        ("/chat", chat(logprobs=1), "logprobs", "valid boolean"),
        ("/chat", chat(max_tokens=5, max_completion_tokens=6), "max_tokens", "older name"),
        ("/chat", chat(messages=[{"role": "assistant"}]), "messages.0.content", "required"),
        ("/chat", chat(messages=[{**HELLO[0], "tool_call_id": "1"}]), "messages.0.tool_call_id", "tool's"),
        ("/chat", chat(tools=[{"type": "function"}]), "tools.0.function", "required"),
        ("/chat", chat(tools=[{"type": "web_search"}]), "tools.0.type", "only 'function'"),
        ("/chat", chat(tools=[tool("a b")]), "tools.0.function.name", "pattern"),
        ("/chat", chat(tools=[tool("f"), tool("f")]), "tools.1.function.name", "two tools"),
        ("/chat", chat(tools=[tool("f", parameters=[])]), "tools.0.function.parameters", "JSON schema"),
        (
            "/chat",
            chat(tools=[tool("f", parameters={"type": "array"})]),
            "tools.0.function.parameters.type",
            "'object'",
        ),
        (
            "/chat",
            chat(tools=[tool("f", parameters={"properties": []})]),
            "tools.0.function.parameters.properties",
            "name",
        ),
        ("/chat", chat(tools=[tool("f", parameters=deep(100))]), "tools.0.function.parameters", "64 levels"),
        ("/chat", chat(tools=[tool("f", description="x", strikt=True)]), "tools.0.function.strikt", "'strict'?"),
        ("/chat", chat(tool_choice="required"), "tool_choice", "needs 'tools'"),
        ("/chat", chat(tools=[tool("f")], tool_choice="always"), "tool_choice.type", "'auto'"),
        ("/chat", chat(tools=[tool("f")], tool_choice=named("g")), "tool_choice", "no tool 'g'"),
        (
            "/chat",
            chat(tools=[tool("f")], tool_choice={"type": "function"}),
            "tool_choice.function",
            "name of a function",
        ),
        ("/chat", chat(functions=[{"name": "f"}]), "functions", "'tools': [{'type': 'function'"),
        ("/chat", chat(function_call={"name": "f"}), "function_call", "'tool_choice'"),
        (
            "/chat",
            chat(messages=[{"role": "assistant", "content": "", "function_call": {"name": "f", "arguments": "{}"}}]),
            "messages.0.function_call",
            "'tool_calls'",
        ),
        ("/chat", chat(enable_thinking="no"), "enable_thinking", "valid boolean"),
        ("/chat", chat(thinking={"type": "maybe"}), "thinking.type", "'disabled'"),
        ("/chat", chat(xtc_probability=0.5, xtc_threshold=0.1), "xtc_probability", "send 0.0"),
        ("/chat", chat(response_format={"type": "jsn"}), "response_format.type", "json_object"),
        ("/chat", chat(response_format={"type": "json_schema"}), "response_format.json_schema", "is needed"),
        ("/chat", chat(response_format={"type": "regex"}), "response_format.value", "is needed"),
        ("/chat", chat(response_format={"type": "json", "value": 3}), "response_format.value", "JSON schema"),
        ("/chat", chat(response_format={"type": "text", "schema": {}}), "response_format.schema", "not allowed"),
        (
            "/chat",
            chat(response_format={"type": "json_schema", "schema": {}, "json_schema": {"name": "a", "schema": {}}}),
            "response_format.json_schema",
            "twice",
        ),
        ("/chat", chat(guided_json=3), "guided_json", "must be a JSON schema"),
        ("/chat", chat(guided_json="{"), "guided_json", "must be a JSON schema"),
        ("/chat", chat(guided_json={}, guided_regex="a"), "guided_regex", "send only one"),
        ("/chat", chat(guided_choice=[]), "guided_choice", "at least one choice"),
        ("/chat", chat(guided_regex="a" * 70_000), "guided_regex", "65536"),
        (
            "/chat",
            chat(structured_outputs={"jsn": {"type": "object"}}),
            "structured_outputs.jsn",
            "did you mean 'json'",
        ),
        (
            "/chat",
            chat(structured_outputs={"structural_tag": "x"}),
            "structured_outputs.structural_tag",
            "not supported",
        ),
        (
            "/generate",
            {"inputs": "x", "parameters": {"grammar": {"type": "regex", "value": 3}}},
            "parameters.grammar.value",
            "regular",
        ),
        ("/chat", chat(modalities=["text", "audio"]), "modalities", "not supported"),
        ("/chat", chat(audio={"voice": "x"}), "audio", "not supported"),
        ("/chat", chat(reasoning_effort="most"), "reasoning_effort", "'low'"),
        ("/chat", chat(reasoning_effort="high", thinking={"type": "disabled"}), "reasoning_effort", "contrary"),
        ("/chat", chat(enable_thinking=True, thinking={"type": "disabled"}), "enable_thinking", "contrary of thinking"),
        (
            "/chat",
            chat(enable_thinking=True, reasoning_effort="none"),
            "enable_thinking",
            "contrary of reasoning_effort",
        ),
        (
            "/chat",
            chat(enable_thinking=False, chat_template_kwargs={"enable_thinking": True}),
            "chat_template_kwargs",
            "contrary of enable_thinking",
        ),
        ("/chat", chat(chat_template_kwargs={"a": deep(100)}), "chat_template_kwargs", "64 levels"),
        ("/chat", chat(prompt="x"), "prompt", "unknown field"),
        # text-generation-inference
        ("/generate", {}, "inputs", "required"),
        ("/generate", {"inputs": ["a"]}, "inputs", "valid string"),
        ("/generate", {"inputs": "a", "stream": True}, "stream", "send false"),
        ("/generate_stream", {"inputs": "a", "stream": False}, "stream", "send true"),
        ("/generate", {"inputs": "a", "max_new_tokens": 5}, "max_new_tokens", "unknown field"),
        ("/generate", generate(temperature=-1), "parameters.temperature", "greater than or equal to 0"),
        ("/generate", generate(min_new_tokens=101), "parameters.min_new_tokens", "max_new_tokens (100)"),
        ("/generate", generate(max_new_tokens=-1), "parameters.max_new_tokens", "greater than or equal to 1"),
        ("/generate", generate(best_of=17), "parameters.best_of", "less than or equal to 16"),
        ("/generate_stream", generate(best_of=2), "parameters.best_of", "not available in streams"),
        ("/generate", generate(typical_p=0.9), "parameters.typical_p", "not supported"),
        ("/generate", generate(watermark=True), "parameters.watermark", "send false"),
        ("/generate", generate(grammar={"type": "regex"}), "parameters.grammar.value", "required"),
        (
            "/generate_stream",
            generate(decoder_input_details=True, details=True),
            "parameters.decoder_input_details",
            "not available in streams",
        ),
        ("/generate", generate(top_n_tokens=21), "parameters.top_n_tokens", "less than or equal to 20"),
        ("/generate", generate(seed=-1), "parameters.seed", "greater than or equal to 0"),
        ("/generate", generate(soft_prompt="a", adapter_id="b"), "parameters.adapter_id", "only one"),
        ("/generate", generate(max_tokens=1), "parameters.max_tokens", "did you mean 'max_new_tokens'?"),
        ("/generate", '{"inputs": "\\ud800"}', "inputs", "unicode"),
        ("/completions", '{"prompt": "a", "cache_salt": "\\ud800"}', "cache_salt", "unicode"),
        ("/completions", '{"prompt": "a", "stop": "\\ud800"}', "stop.0", "unicode"),
        ("/completions", '{"prompt": "a", "model": "\\ud800"}', "model", "unicode"),
        # tokens
        ("/tokenize", {}, "prompt", "either 'prompt' or 'messages'"),
        ("/tokenize", {"prompt": "a", "messages": HELLO}, "prompt", "either 'prompt' or 'messages'"),
        ("/tokenize", {"prompt": "a" * (2**20 + 1)}, "prompt", "at most 1048576 characters"),
        ("/detokenize", {"tokens": "abc"}, "tokens", "list of token ids"),
        ("/detokenize", {"tokens": [1, -5]}, "tokens.1", "integer from 0"),
        ("/detokenize", {"tokens": [1] * (2**18 + 1)}, "tokens", "at most 262144"),
    ],
)
def test_refuses_by_name(client: TestClient, route: str, body: Any, param: str, says: str) -> None:
    error = error_of(client, route, body)
    assert error["param"] == param
    assert says in error["message"]
    assert error["message"].startswith(param[:50])


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("field", ["temperature", "top_p", "min_p", "presence_penalty", "repetition_penalty"])
def test_refuses_numbers_that_are_not_finite(client: TestClient, field: str, number: str) -> None:
    error = error_of(client, "/completions", f'{{"prompt": "a", "{field}": {number}}}')
    assert error["param"] == field
    assert "finite number" in error["message"]


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("", "a JSON object is expected"),
        ("[]", "a JSON object is expected"),
        ('"text"', "a JSON object is expected"),
        ("null", "a JSON object is expected"),
        ('{"prompt": }', "not valid JSON: Expecting value, at character 11"),
        ('{"prompt": "a"', "not valid JSON"),
        (b'{"prompt": "\xff"}', "must be UTF-8"),
        ("[" * 100_000, "not nested"),
        ('{"prompt":' * 20_000, "not nested"),
        ('{"seed": ' + "9" * 5000 + "}", "not valid JSON"),
    ],
)
def test_refuses_bodies_that_are_no_json_object(client: TestClient, body: str | bytes, says: str) -> None:
    error = error_of(client, "/completions", body)
    assert says in error["message"]
    assert error["param"] is None


@pytest.mark.parametrize("content_type", [None, "text/plain", "application/x-www-form-urlencoded"])
def test_refuses_other_content_types(client: TestClient, content_type: str | None) -> None:
    headers = {"content-type": content_type} if content_type else {}
    reply = client.post("/completions", content='{"prompt": "a"}', headers=headers)
    assert reply.status_code == 400
    assert "Content-Type: application/json" in reply.json()["error"]["message"]


def test_never_echoes_what_was_sent(client: TestClient) -> None:
    secret = "s3cret" * 50
    for body in (
        completion(temperature=secret),
        completion(stop=[secret * 10]),
        completion(prompt={"a": secret}),
        completion(suffix=secret),
        completion(logit_bias={secret: 1}),
    ):
        assert secret not in post(client, "/completions", body).text


def test_a_large_bad_body_makes_one_small_error() -> None:
    """Every error pydantic reports costs a kilobyte or so; a body of megabytes can hold millions of them."""
    messages = [{"role": "user", "content": [{}] * 64}] * 1024
    with pytest.raises(ValidationError) as caught:
        ChatCompletionRequest.model_validate({"messages": messages, "stop": [{}] * 16, "stop_token_ids": [""] * 64})
    assert caught.value.error_count() < 100


def test_unprintable_field_names_do_no_harm(client: TestClient) -> None:
    for name in ("\\ud800", "\\u0000\\n", "{message}", "%s"):
        error = error_of(client, "/completions", f'{{"prompt": "a", "{name}": 1}}')
        assert error["code"] == "unknown_field"


@settings(max_examples=300, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(sorted({*CompletionRequest.model_fields, *CompletionRequest.unsupported, "x"})),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
            lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
            max_leaves=6,
        ),
    )
)
def test_any_json_is_either_taken_within_bounds_or_refused(body: dict[str, Any]) -> None:
    """No value of any field raises anything but a validation error, and what is taken is bounded."""
    try:
        request = CompletionRequest.model_validate(body)
    except ValidationError as error:
        answer = validation_error([{**e, "loc": ("body", *e["loc"])} for e in error.errors(include_url=False)])
        assert answer.status == 400
        return
    assert "prompt" in body
    assert 1 <= len(request.prompt) * request.n <= 64
    params = request.sampling_params(request.logprobs)
    assert 0 <= params.temperature <= 2
    assert 0 < params.top_p <= 1
    assert params.top_k >= 0
    assert request.seed_of(15) is None or 0 <= request.seed_of(15) < 2**63


def test_choices_draw_from_different_seeds_that_fit_63_bits() -> None:
    request = CompletionRequest.model_validate(completion(n=3, seed=-1))
    assert [request.seed_of(choice) for choice in range(3)] == [2**63 - 1, 0, 1]
    assert CompletionRequest.model_validate(completion(n=3)).seed_of(2) is None


@pytest.mark.parametrize(("sent", "meant"), [(-1, 0), (0, 0), (7, 7)])
def test_top_k_can_be_off_in_two_ways(sent: int, meant: int) -> None:
    assert CompletionRequest.model_validate(completion(top_k=sent)).sampling_params(None).top_k == meant


def test_prompts_are_normalised_to_a_list() -> None:
    def prompts(prompt: Any) -> Any:
        return CompletionRequest.model_validate({"prompt": prompt}).prompt

    assert prompts("a") == ["a"]
    assert prompts(["a", ""]) == ["a", ""]
    assert prompts([1, 2]) == [[1, 2]]
    assert prompts([[1], [2]]) == [[1], [2]]


def test_messages_become_turns() -> None:
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    ]
    request = ChatCompletionRequest.model_validate({"messages": messages})
    assert [message.as_turn() for message in request.messages] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "a\nb"},
    ]


def test_chat_token_limit_and_logprobs() -> None:
    def request(**fields: Any) -> ChatCompletionRequest:
        return ChatCompletionRequest.model_validate(chat(**fields))

    assert request().token_limit is None
    assert request(max_tokens=7).token_limit == 7
    assert request(max_completion_tokens=8).token_limit == 8
    assert request().num_logprobs is None
    assert request(logprobs=True).num_logprobs == 0
    assert request(logprobs=True, top_logprobs=3).num_logprobs == 3


def test_only_who_asks_for_several_calls_gets_them_where_one_must_be_made() -> None:
    chat_tools: Any = chat(tools=[tool("f")], tool_choice="required")
    responses: Any = {"input": "x", "tools": [{"type": "function", "name": "f"}], "tool_choice": "required"}
    messages: Any = {"messages": HELLO, "max_tokens": 1, "tools": [{"name": "f", "input_schema": {}}]}
    for sent, parallel in ((None, False), (False, False), (True, True)):
        switch = {"parallel_tool_calls": sent}
        assert ChatCompletionRequest.model_validate(chat_tools | switch).tool_use.parallel == parallel
        assert ResponsesRequest.model_validate(responses | switch).tool_use.parallel == parallel
        choice = {"type": "any", "disable_parallel_tool_use": None if sent is None else not sent}
        assert MessagesRequest.model_validate(messages | {"tool_choice": choice}).tool_use.parallel == parallel
        free = MessagesRequest.model_validate(messages | {"tool_choice": choice | {"type": "auto"}}).tool_use
        assert free.parallel == (sent is not False)


@pytest.mark.parametrize(
    ("parameters", "temperature"),
    [
        ({}, 0.0),
        ({"temperature": 1.0}, 0.0),
        ({"do_sample": True}, 1.0),
        ({"do_sample": True, "temperature": 0.5}, 0.5),
        ({"do_sample": False, "temperature": 0.5, "top_p": 0.9}, 0.0),
        ({"temperature": 0.5}, 0.5),
        ({"top_p": 0.9}, 1.0),
        ({"top_k": 5}, 1.0),
    ],
)
def test_tgi_samples_when_asked_to(parameters: dict[str, Any], temperature: float) -> None:
    parsed = GenerateParameters.model_validate(parameters)
    assert parsed.sampling_params(None).temperature == temperature
    assert parsed.samples == (temperature > 0)


def test_chunks_leave_out_what_adds_nothing_but_keep_the_nulls_that_clients_read() -> None:
    choice = ChatChunkChoice(index=0, delta=ChatDelta(content="hi"))
    chunk = json.loads(ChatCompletionChunk(id="c", created=1, model="m", choices=[choice]).model_dump_json())
    assert chunk == {
        "id": "c",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": "m",
        "choices": [{"index": 0, "delta": {"content": "hi"}, "logprobs": None, "finish_reason": None}],
        "system_fingerprint": f"softbatch-{VERSION}",
        "usage": None,
    }
