"""Whatever a chat's body holds, the answer is a reply or a 4xx that tells nothing of anybody else's request."""

from __future__ import annotations

import json
import secrets
from collections import Counter
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from softbatch.server.schemas.chat import ChatCompletionRequest
from tests.support.servers import Server, error_of, events_of

CHAT = "/v1/chat/completions"
FIELDS = sorted({*ChatCompletionRequest.model_fields, *ChatCompletionRequest.unsupported, "max_tokns", "\ud800", ""})
ROLES = st.sampled_from(["system", "developer", "user", "assistant", "tool", "function", "", None, 5])
# Lone surrogates, control characters and words that look like the template's own.
WORDS = st.one_of(st.text(st.characters(), max_size=12), st.sampled_from(["<|im_end|>", "{{x}}", "\ud800", "\0", "‮"]))
NUMBERS = st.one_of(
    st.sampled_from([0, -1, 1, 2**31, 2**63, -(2**63), 2**64, 10**400, 1e308, 5e-324, float("nan"), float("-inf")]),
    st.integers(-3, 70_000),
    st.floats(),
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, WORDS)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3), max_leaves=6
)
PARTS = st.fixed_dictionaries({"type": st.just("text"), "text": WORDS})
MESSAGES = st.one_of(
    st.fixed_dictionaries({"role": ROLES, "content": WORDS}, optional={"name": VALUES, "tool_calls": VALUES}),
    st.fixed_dictionaries({"role": ROLES, "content": st.lists(PARTS | VALUES, max_size=3)}),
    VALUES,
)
# As people mean them, so that not all ends at the first wrong field.
TURNS = st.lists(st.fixed_dictionaries({"role": st.just("user"), "content": WORDS}), min_size=1, max_size=3)
PLAUSIBLE = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0, 0.7, 2, None]),
        "top_p": st.sampled_from([0, 0.5, 1]),
        "stream": st.booleans(),
        "n": st.integers(1, 3),
        "stop": st.lists(WORDS, max_size=2) | WORDS,
        "logprobs": st.just(True),
        "logit_bias": st.dictionaries(st.integers(0, 50_000).map(str), st.floats(-100, 100), max_size=3),
        "bad_words": st.lists(WORDS, max_size=2),
        "allowed_token_ids": st.lists(st.integers(0, 49_151), min_size=1, max_size=3),
        "truncate_prompt_tokens": st.integers(-1, 9),
        "continue_final_message": st.booleans(),
        "skip_special_tokens": st.booleans(),
        "return_token_ids": st.booleans(),
        "include_stop_str_in_output": st.booleans(),
        "seed": st.integers(-(2**63), 2**63 - 1),
    },
)
BODIES = st.builds(
    lambda messages, plausible, others: {"messages": messages, "max_tokens": 2, **plausible, **others},
    TURNS | TURNS | st.lists(MESSAGES, max_size=4) | VALUES,
    PLAUSIBLE,
    st.just({}) | st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=3),
)


@pytest.fixture(scope="module")
def secret(tiny_server: Server) -> str:
    """A word that only another request holds, in its prompt and in its answer."""
    word = secrets.token_hex(8)
    messages = [{"role": "user", "content": word}]
    body = {"messages": messages, "max_tokens": 1, "structured_outputs": {"choice": [word]}, "user": word}
    reply = tiny_server.post(CHAT, body | {"max_tokens": 40})
    assert reply.json()["choices"][0]["message"]["content"] == word
    return word


def check(reply: httpx.Response, secret: str) -> int:
    assert secret not in reply.text
    assert reply.status_code in (200, 400, 404, 413, 422), reply.text
    if reply.status_code != 200:
        error_of(reply)
    elif reply.headers["content-type"].startswith("text/event-stream"):
        events = list(events_of(iter(reply.text.splitlines())))
        assert events[-1] == "[DONE]", events
    else:
        assert reply.json()["choices"]
    return reply.status_code


def test_never_a_server_error_nor_anothers_text(tiny_server: Server, secret: str) -> None:
    statuses: Counter[int] = Counter()

    @settings(max_examples=150, deadline=None, derandomize=True, database=None)
    @given(body=BODIES)
    def send(body: dict[str, Any]) -> None:
        content = json.dumps(body)  # with NaN and Infinity, as Python's clients send them
        reply = tiny_server.http.post(CHAT, content=content, headers={"content-type": "application/json"})
        statuses[check(reply, secret)] += 1

    send()
    assert min(statuses[200], statuses[400]) > 20, "bodies of one kind alone show little"


@pytest.mark.parametrize("depth", [50, 900, 5_000, 100_000])
@pytest.mark.parametrize("field", ["messages", "metadata", "response_format", "logit_bias", "tools", "x"])
def test_no_depth_is_too_much(tiny_server: Server, secret: str, depth: int, field: str) -> None:
    for opening, closing in (("[", "]"), ('{"a":', "}")):
        nested = opening * depth + "1" + closing * depth
        rest = "" if field == "messages" else '"messages": [{"role": "user", "content": "a"}], "max_tokens": 1, '
        body = f'{{{rest}"{field}": {nested}}}'
        check(tiny_server.http.post(CHAT, content=body, headers={"content-type": "application/json"}), secret)
