"""Recall over HTTP: passages of the text that a soft prompt keeps stand before the question, on every route."""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from softbatch.prompt_store.compression.data.passage_index import PassageIndex
from softbatch.prompt_store.compression.data.passages import before_question, joined
from softbatch.prompt_store.manifest import ModelSpec
from tests.support.models import Reference, make_soft_prompt, save_prompt
from tests.support.servers import Server, error_of

NAME = "recalling"
TEXT = "# Harbour\n\n" + "\n\n".join(
    f"## Berth {name}\n\nThe {name} berth is {n + 9} metres long, has <|im_end|> water and power, and costs "
    f"{n * 7 + 20} crowns a night. Its keeper is called {name}son and comes at {n + 6} in the morning."
    for n, name in enumerate(("anchor", "bollard", "capstan", "dinghy", "estuary"))
)
QUESTION = "What does the capstan berth cost?"


@pytest.fixture(scope="module")
def file(tiny_spec: ModelSpec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    prompt = make_soft_prompt("kv", 9, tiny_spec, scale=0.5, replaces="system")
    return save_prompt(prompt, tmp_path_factory.mktemp("recall"), NAME)


@pytest.fixture(scope="module")
def server(tiny_server: Server, file: Path) -> Iterator[Server]:
    assert register(tiny_server, file, text=TEXT, recall="1").status_code == 201
    yield tiny_server
    assert tiny_server.http.delete(f"/v1/soft_prompts/{NAME}").status_code == 200
    assert not list((tiny_server.store / ".texts").iterdir())


def register(server: Server, file: Path, name: str = NAME, **fields: str) -> Any:
    with file.open("rb") as content:
        return server.http.post("/v1/soft_prompts", data={"name": name, **fields}, files={"file": content})


def chat(server: Server, question: str, **fields: Any) -> dict[str, Any]:
    body = {"model": NAME, "messages": [{"role": "user", "content": question}], "max_tokens": 6, "temperature": 0}
    reply = server.http.post("/v1/chat/completions", json=body | fields)
    assert reply.status_code == 200, reply.text
    return dict(reply.json())


def content(reply: dict[str, Any]) -> str:
    return str(reply["choices"][0]["message"]["content"])


def test_the_reply_is_as_if_the_client_had_sent_the_passages(server: Server) -> None:
    found = PassageIndex(TEXT).best(QUESTION, 2)
    assert "34 crowns" in found[0].text
    recalled = chat(server, QUESTION, recall=2, return_recalled=True)
    sent = chat(server, before_question(found, QUESTION), recall=0)
    assert content(recalled) == content(sent)
    assert recalled["usage"]["prompt_tokens"] == sent["usage"]["prompt_tokens"]
    assert recalled["recalled"] == [{"text": one.text, "start": one.start, "end": one.end} for one in found]
    details = recalled["usage"]["prompt_tokens_details"]
    assert 0 < details["recalled_tokens"] < recalled["usage"]["prompt_tokens"]
    assert "recalled_tokens" not in sent["usage"]["prompt_tokens_details"]
    assert "recalled" not in sent


def test_the_registration_says_how_many_where_a_request_does_not(server: Server) -> None:
    assert server.http.get(f"/v1/soft_prompts/{NAME}").json()["recall"] == 1
    assert len(chat(server, QUESTION, return_recalled=True)["recalled"]) == 1
    assert chat(server, QUESTION, recall=0, return_recalled=True)["recalled"] == []
    assert chat(server, "Zzyx?", return_recalled=True)["recalled"] == []


def test_passages_that_were_not_asked_for_make_no_request_too_long(server: Server) -> None:
    usage = chat(server, "capstan", recall=0, max_tokens=1)["usage"]
    word = chat(server, "capstan capstan", recall=0, max_tokens=1)["usage"]["prompt_tokens"] - usage["prompt_tokens"]
    question = "capstan " * ((512 - usage["prompt_tokens"] - 20) // max(1, word))
    assert chat(server, question, max_tokens=4, return_recalled=True)["recalled"] == []
    body = {"model": NAME, "messages": [{"role": "user", "content": question}], "max_tokens": 4, "recall": 1}
    refused = server.http.post("/v1/chat/completions", json=body)
    assert (refused.status_code, error_of(refused)["code"]) == (400, "context_length_exceeded")


def test_popular_passages_are_computed_once(server: Server) -> None:
    chat(server, "Is the dinghy berth long?")
    again = chat(server, "Who keeps the dinghy berth? Say his name.", return_recalled=True)
    assert "dinghyson" in again["recalled"][0]["text"]
    details = again["usage"]["prompt_tokens_details"]
    assert details["cached_tokens"] >= 9 + details["recalled_tokens"] - 2 * 16
    assert chat(server, QUESTION, cache_salt="mine")["usage"]["prompt_tokens_details"]["cached_tokens"] == 9


def test_every_route_recalls(server: Server, tiny_llama: Reference) -> None:
    raw = joined(PassageIndex(TEXT).best(QUESTION, 1))
    body = {"model": NAME, "max_tokens": 6, "temperature": 0, "recall": 1, "return_recalled": True}
    for prompt in (QUESTION, tiny_llama.tokenizer.encode(QUESTION, add_special_tokens=False)):
        reply = server.http.post("/v1/completions", json=body | {"prompt": prompt}).json()
        assert reply["recalled"][0]["text"] == raw
        assert reply["usage"]["prompt_tokens_details"]["recalled_tokens"] > 0
    parameters = {"soft_prompt": NAME, "max_new_tokens": 6, "return_recalled": True, "truncate": 3}
    whole = server.http.post("/generate", json={"inputs": QUESTION, "parameters": parameters}).json()
    assert whole["recalled"][0]["text"] == raw
    turns = [{"role": "user", "content": QUESTION}]
    for route, body in (
        ("messages", {"model": NAME, "messages": turns, "max_tokens": 2}),
        ("responses", {"model": NAME, "input": QUESTION, "max_output_tokens": 2}),
    ):
        counts = [
            server.http.post(f"/v1/{route}", json=body | {"recall": recall}).json()["usage"] for recall in (0, 1, 2)
        ]
        totals = [one["input_tokens"] + one.get("cache_read_input_tokens", 0) for one in counts]
        assert totals == sorted(set(totals)), "more passages are more tokens"
        if route == "messages":
            fields = {"model": NAME, "messages": turns}
            asked: list[dict[str, Any]] = [{"recall": 0}, {"recall": 1}, {"recall": 2}, {}]
            told = [server.http.post("/v1/messages/count_tokens", json=fields | one).json() for one in asked]
            assert [one["input_tokens"] for one in told] == [*totals, totals[1]]
        refused = server.http.post(f"/v1/{route}", json=body | {"recall": 17})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "recall")
    scored = {"input": QUESTION, "candidates": ["34", "20"], "soft_prompt": NAME, "return_recalled": True}
    found = server.http.post("/v1/score", json=scored).json()
    assert found["recalled"][0]["text"] == raw
    without = server.http.post("/v1/score", json=scored | {"recall": 0}).json()
    recalled = found["usage"]["prompt_tokens_details"]["recalled_tokens"]
    assert found["usage"]["prompt_tokens"] >= without["usage"]["prompt_tokens"] + recalled
    assert found["candidates"][0]["logprob"] != without["candidates"][0]["logprob"]


def test_a_stream_shows_its_passages_first(server: Server) -> None:
    body = {"model": NAME, "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 3, "stream": True}
    with server.http.stream("POST", "/v1/chat/completions", json=body | {"return_recalled": True}) as reply:
        lines = [line.removeprefix("data: ") for line in reply.iter_lines() if line]
    first, *others = [json.loads(line) for line in lines if line != "[DONE]"]
    assert "capstan" in first["recalled"][0]["text"]
    assert not any("recalled" in chunk for chunk in others)


def test_a_prompt_that_is_shown_or_scored_is_what_the_client_sent(server: Server) -> None:
    body = {"model": NAME, "prompt": QUESTION, "max_tokens": 1, "echo": True, "logprobs": 0}
    reply = server.http.post("/v1/completions", json=body).json()
    assert reply["choices"][0]["text"].startswith(QUESTION)
    refused = server.http.post("/v1/completions", json=body | {"recall": 1})
    assert (refused.status_code, error_of(refused)["param"]) == (400, "recall")


def test_the_text_is_nowhere_to_be_had(server: Server) -> None:
    (kept,) = (server.store / ".texts").iterdir()
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    listed = server.http.get("/v1/soft_prompts").text + server.http.get(f"/v1/soft_prompts/{NAME}").text
    assert "capstan" not in listed
    assert b"capstan" not in server.http.get(f"/v1/soft_prompts/{NAME}/content").content
    assert server.http.get(f"/v1/soft_prompts/{kept.name}/content").status_code == 404


def test_what_cannot_be_recalled_is_refused_by_name(server: Server, file: Path) -> None:
    assert register(server, file, "silent").status_code == 201
    try:
        for fields in ({"model": "silent"}, {"model": None}):
            message = [{"role": "user", "content": QUESTION}]
            refused = server.http.post("/v1/chat/completions", json={"messages": message, "recall": 2} | fields)
            assert refused.status_code == 400
            assert (error_of(refused)["param"], error_of(refused)["code"]) == ("recall", "no_kept_text")
        parameters = {"soft_prompt": "silent", "recall": 2}
        refused = server.http.post("/generate", json={"inputs": QUESTION, "parameters": parameters})
        assert (refused.status_code, refused.json()["param"]) == (400, "parameters.recall")
    finally:
        server.http.delete("/v1/soft_prompts/silent")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"text": " "}, "text"),
        ({"text": "x" * ((1 << 20) + 1)}, "text"),
        ({"text": TEXT, "recall": "17"}, "recall"),
        ({"text": TEXT, "recall": "two"}, "recall"),
        ({"recall": "2"}, "recall"),
        ({"texts": TEXT}, "texts"),
    ],
)
def test_a_text_that_cannot_be_kept_is_refused(server: Server, file: Path, fields: dict[str, str], param: str) -> None:
    refused = register(server, file, "unkept", **fields)
    assert refused.status_code in (400, 413, 422), refused.text
    assert error_of(refused)["param"] == param or ("text" in fields and len(fields["text"]) > 1 << 20)
    assert server.http.get("/v1/soft_prompts/unkept").status_code == 404
