"""Requests of every kind, and their answers in a form that can be compared: by themselves, and beside others."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from tests.support.models import sample_texts
from tests.support.servers import Server

CHAT, COMPLETE, STREAM, SCORE = "/v1/chat/completions", "/v1/completions", "/generate_stream", "/v1/score"
# Names of soft prompts that have to be registered before.
EMBEDDINGS, KEYS_AND_VALUES = "mixed-embeddings", "mixed-kv"
# Of texts that are not whole at the end of their tokens.
LONG = {"type": "array", "items": {"enum": ["sea", "tide", 7, None]}, "minItems": 100}
CALLED = {"type": "object", "properties": {"place": {"type": "string", "minLength": 1000}}, "required": ["place"]}
TOOL = {"type": "function", "function": {"name": "look_up", "parameters": CALLED}}


@dataclass(frozen=True)
class MixedRequest:
    route: str
    body: dict[str, Any]

    @property
    def is_stream(self) -> bool:
        return self.route == STREAM or bool(self.body.get("stream"))


def mixed_requests(count: int, max_tokens: int) -> list[MixedRequest]:
    """Streams and whole replies; chats, completions and scores; soft prompts of both kinds; greedy and seeded;
    log-probabilities, penalties, stop strings, several choices; held to a schema, or to a call of a tool. All of a
    length that the request decides."""
    made = []
    for index, text in enumerate(sample_texts(count)):
        common = {"max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
        drawn = common | {"temperature": 0.9, "top_p": 0.95, "seed": 1000 + index}
        streamed = {"stream": True, "stream_options": {"include_usage": True}}
        turns = {"messages": [{"role": "user", "content": text}]}
        prompt = {"prompt": text}
        details = {"max_new_tokens": max_tokens, "top_n_tokens": 2, "do_sample": True, "seed": index}
        schema = {"type": "json_schema", "json_schema": {"name": "long", "schema": LONG}}
        candidates = ["The sea.", "Nobody knows.", "It is a long story that begins with a clock."]
        kinds: list[tuple[str, dict[str, Any]]] = [
            (CHAT, common | turns | streamed),
            (COMPLETE, common | prompt | {"logprobs": 3, "echo": True}),
            (COMPLETE, drawn | prompt | streamed | {"soft_prompt": EMBEDDINGS}),
            (CHAT, drawn | turns | {"n": 3}),
            (COMPLETE, common | prompt | streamed | {"soft_prompt": KEYS_AND_VALUES, "presence_penalty": 0.7, "n": 2}),
            (STREAM, {"inputs": text, "parameters": details}),
            (COMPLETE, drawn | prompt | {"stop": ["zq"], "repetition_penalty": 1.2, "soft_prompt": KEYS_AND_VALUES}),
            (CHAT, drawn | turns | streamed | {"logprobs": True, "top_logprobs": 2, "n": 2}),
            (SCORE, {"input": text, "candidates": candidates}),
            (CHAT, drawn | turns | streamed | {"response_format": schema}),
            (CHAT, drawn | turns | streamed | {"tools": [TOOL], "tool_choice": "required"}),
        ]
        made.append(MixedRequest(*kinds[index % len(kinds)]))
    return made


async def answers_of(server: Server, requests: Sequence[MixedRequest]) -> list[Any]:
    """Of all at once. What goes wrong is an answer `{"error": …}`."""
    async with server.async_http() as client:
        client.timeout = httpx.Timeout(None)  # how long the last one waits is up to the machine
        return await asyncio.gather(*(answer_of(client, request) for request in requests))


async def answer_of(client: httpx.AsyncClient, request: MixedRequest) -> Any:
    try:
        if not request.is_stream:
            reply = await client.post(request.route, json=request.body)
            return _without_names(reply.json()) if reply.status_code == 200 else _error(reply.status_code, reply.text)
        events: list[Any] = []
        async with client.stream("POST", request.route, json=request.body) as reply:
            if reply.status_code != 200:
                return _error(reply.status_code, (await reply.aread()).decode())
            async for line in reply.aiter_lines():
                if line.startswith("data: ") and line != "data: [DONE]":
                    events.append(json.loads(line.removeprefix("data: ")))
        failed = next((event for event in events if "error" in event), None)
        return failed or _joined(events)
    except (httpx.HTTPError, ValueError) as error:
        return _error(0, repr(error))


def is_error(answer: Any) -> bool:
    return isinstance(answer, dict) and "error" in answer


def difference(answer: Any, other: Any, tolerance: float) -> str | None:
    """Where two answers differ; numbers that are not whole may do so by `tolerance`."""
    if isinstance(answer, float) and isinstance(other, float | int):
        return None if abs(answer - other) <= tolerance else f"{answer} is not {other}"
    if isinstance(answer, dict) and isinstance(other, dict) and answer.keys() == other.keys():
        # Another engine has nothing cached.
        pairs = [(str(key), value, other[key]) for key, value in answer.items() if key != "cached_tokens"]
    elif isinstance(answer, list) and isinstance(other, list) and len(answer) == len(other):
        pairs = [(str(index), *pair) for index, pair in enumerate(zip(answer, other, strict=True))]
    else:
        return None if answer == other else f"{answer!r:.200} is not {other!r:.200}"
    found = ((key, difference(one, two, tolerance)) for key, one, two in pairs)
    return next((f"{key}: {reason}" for key, reason in found if reason), None)


def _error(status: int, text: str) -> dict[str, Any]:
    return {"error": {"status": status, "text": text[:500]}}


def _without_names(reply: Any) -> Any:
    return {key: value for key, value in reply.items() if key not in ("id", "created")} | _usage(reply.get("usage"))


def _usage(usage: dict[str, Any] | None) -> dict[str, Any]:
    """Without what the prefix cache had: that depends on who came before."""
    counts = {key: value for key, value in (usage or {}).items() if key != "prompt_tokens_details"}
    return {"usage": counts}


def _joined(events: Sequence[Any]) -> Any:
    """A stream as one value: however tokens were spread over its events."""
    if "token" in events[0]:
        tokens = [{"id": event["token"]["id"], "logprob": event["token"]["logprob"]} for event in events]
        text = "".join(event["token"]["text"] for event in events)
        return [tokens, text, [event["top_tokens"] for event in events], events[-1]["details"]]
    choices: dict[int, dict[str, Any]] = {}
    usage = None
    for event in events:
        usage = event.get("usage") or usage
        for part in event["choices"]:
            choice = choices.setdefault(part["index"], {"text": "", "logprobs": [], "finish_reason": None})
            delta = part.get("delta", {})
            choice["text"] += part.get("text") or delta.get("content") or ""
            for call in delta.get("tool_calls") or ():
                choice["text"] += call["function"].get("name", "") + call["function"]["arguments"]
            choice["logprobs"] += (part.get("logprobs") or {}).get("content") or []
            choice["finish_reason"] = part["finish_reason"] or choice["finish_reason"]
    return {"choices": {str(index): choice for index, choice in sorted(choices.items())}, **_usage(usage)}
