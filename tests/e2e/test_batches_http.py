"""OpenAI's files and batches, by its own client: the answers are those of the routes, whatever ends the server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from openai import OpenAI
from openai.types import Batch

from tests.support.openai_requests import client_of
from tests.support.servers import Server, wait_for

ENDED = {"completed", "failed", "cancelled", "expired"}
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


@pytest.fixture(scope="module")
def client(tiny_server: Server) -> Iterator[OpenAI]:
    with client_of(tiny_server) as client:
        yield client


def requests(url: str, *bodies: dict[str, Any]) -> bytes:
    lines = (
        json.dumps({"custom_id": f"q{i}", "method": "POST", "url": url, "body": body}) for i, body in enumerate(bodies)
    )
    return "\n".join(lines).encode()


def start(client: OpenAI, url: Any, content: bytes, **fields: Any) -> Batch:
    file = client.files.create(file=("in.jsonl", content), purpose="batch")
    return client.batches.create(input_file_id=file.id, endpoint=url, completion_window="24h", **fields)


def ended(client: OpenAI, batch_id: str) -> Batch:
    def look() -> Batch | None:
        batch = client.batches.retrieve(batch_id)
        return batch if batch.status in ENDED else None

    found = wait_for(look, "the batch does not end")
    assert found is not None
    return found


def lines_of(client: OpenAI, file_id: str | None) -> dict[str, dict[str, Any]]:
    """By custom_id, of which none is there twice."""
    if file_id is None:
        return {}
    lines = [json.loads(line) for line in client.files.content(file_id).text.splitlines()]
    found = {line["custom_id"]: line for line in lines}
    assert len(found) == len(lines)
    return found


def without_what_differs(body: dict[str, Any]) -> dict[str, Any]:
    """Without ids, times, and what the prefix cache had."""
    usage = {name: value for name, value in body["usage"].items() if not name.endswith("details")}
    return {name: value for name, value in body.items() if name not in ("id", "created")} | {"usage": usage}


@pytest.mark.parametrize(
    ("url", "body"),
    [
        (CHAT, {"messages": [{"role": "user", "content": "Is the sea deep?"}], "max_tokens": 4, "temperature": 0}),
        (COMPLETIONS, {"prompt": ["Is the sea", "winter"], "max_tokens": 4, "temperature": 0, "logprobs": 2}),
        ("/v1/embeddings", {"input": "Is the sea deep?", "encoding_format": "base64"}),
        ("/v1/responses", {"input": "Is the sea deep?", "max_output_tokens": 4, "temperature": 0}),
    ],
)
def test_a_line_is_answered_as_its_route_answers(
    client: OpenAI, tiny_server: Server, url: str, body: dict[str, Any]
) -> None:
    body = {"model": "tiny-llama", **body}
    expected = tiny_server.post(url, body).json()
    refused = tiny_server.post(url, body | {"temperatur": 1}).json()
    batch = start(client, url, requests(url, body, body | {"temperatur": 1}), metadata={"night": "first"})
    assert (batch.status, batch.metadata, batch.endpoint) == ("validating", {"night": "first"}, url)
    batch = ended(client, batch.id)
    assert (batch.status, batch.errors) == ("completed", None)
    assert batch.request_counts is not None
    assert batch.request_counts.to_dict() == {"total": 2, "completed": 1, "failed": 1}
    (line,) = lines_of(client, batch.output_file_id).values()
    assert (line["custom_id"], line["error"], line["response"]["status_code"]) == ("q0", None, 200)
    answer = line["response"]["body"]
    if url != "/v1/responses":  # whose items have ids too
        assert without_what_differs(answer) == without_what_differs(expected)
    (line,) = lines_of(client, batch.error_file_id).values()
    assert (line["custom_id"], line["error"], line["response"]["status_code"]) == ("q1", None, 400)
    assert line["response"]["body"] == refused


def test_a_stream_is_refused_line_by_line(client: OpenAI) -> None:
    batch = ended(client, start(client, COMPLETIONS, requests(COMPLETIONS, {"prompt": "a", "stream": True})).id)
    (line,) = lines_of(client, batch.error_file_id).values()
    assert (batch.status, batch.output_file_id) == ("completed", None)
    assert (line["response"]["status_code"], line["response"]["body"]["error"]["param"]) == (400, "stream")


def test_a_wrong_file_fails_with_its_lines(client: OpenAI) -> None:
    batch = ended(client, start(client, CHAT, requests(COMPLETIONS, {"prompt": "a"}) + b"\n{").id)
    assert (batch.status, batch.output_file_id) == ("failed", None)
    assert batch.errors is not None
    assert [(error.code, error.line) for error in batch.errors.data or []] == [
        ("url_mismatch", 1),
        ("invalid_json_line", 2),
    ]
