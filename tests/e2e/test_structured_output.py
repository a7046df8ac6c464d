"""Structured output over HTTP: whatever a model with random weights says follows what was asked for."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from pydantic import BaseModel

from softbatch.prompt_store.manifest import ModelSpec
from tests.support.models import make_soft_prompt, save_prompt
from tests.support.schemas import SCHEMAS
from tests.support.servers import Server, error_of

QUESTION = [{"role": "user", "content": "Who are you?"}]
PRIMES = (101, 103, 107, 109)  # their product is what a number is to be a multiple of
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def chat(server: Server, **fields: Any) -> dict[str, Any]:
    body = {"messages": QUESTION, "max_tokens": 200, "temperature": 1, "seed": 1} | fields
    reply = server.post("/v1/chat/completions", body)
    assert reply.status_code == 200, reply.text
    choice: dict[str, Any] = reply.json()["choices"][0]
    return choice


def as_format(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}


def test_every_finished_output_follows_its_schema(tiny_server: Server) -> None:
    def ask(case: tuple[int, dict[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
        return case[1], chat(tiny_server, response_format=as_format(case[1]), seed=case[0], max_tokens=300)

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, enumerate(SCHEMAS)))
    finished = 0
    for schema, choice in answers:
        if choice["finish_reason"] == "stop":
            finished += 1
            jsonschema.validate(
                json.loads(choice["message"]["content"]), schema, format_checker=jsonschema.FormatChecker()
            )
    assert finished > 0.8 * len(SCHEMAS)  # random weights may write the longest string that fits


SECRET = {
    "type": "object",
    "properties": {"format": {"const": "password", "format": "secret"}},
    "required": ["format"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"guided_regex": r"[A-Z]{3}-\d{4}"}, r"[A-Z]{3}-\d{4}"),
        ({"structured_outputs": {"regex": r"(yes|no)!"}}, r"(yes|no)!"),
        ({"guided_choice": ["red", "blau", 'ro"t\n']}, 'red|blau|ro"t\n'),
        ({"structured_outputs": {"choice": ["été", "日本"]}}, "été|日本"),
        ({"guided_grammar": 'start: "x" start "y" | "."'}, r"x{0,400}\.y{0,400}"),
        ({"structured_outputs": {"grammar": 'root ::= "a" [0-9]+ ";"'}}, r"a[0-9]+;"),
        # As text-generation-inference and llama.cpp have it.
        ({"response_format": {"type": "regex", "value": "[ab]{4}"}}, "[ab]{4}"),
        ({"response_format": {"type": "json", "value": {"enum": ["x"]}}}, r'\s*"x"\s*'),
        ({"response_format": {"type": "json_object", "schema": {"enum": ["x"]}}}, r'\s*"x"\s*'),
        # A format that is no part of JSON Schema says nothing; a property of this name says what it says.
        ({"guided_json": SECRET}, r'\{\s*"format"\s*:\s*"password"\s*\}'),
    ],
)
def test_the_text_is_one_that_was_asked_for(tiny_server: Server, fields: dict[str, Any], pattern: str) -> None:
    choice = chat(tiny_server, **fields)
    if choice["finish_reason"] == "stop":
        assert re.fullmatch(pattern, choice["message"]["content"])
    else:
        assert len(fields) == 1


@pytest.mark.parametrize("temperature", [0, 1])
def test_json_mode_makes_an_object(tiny_server: Server, temperature: float) -> None:
    choice = chat(tiny_server, response_format={"type": "json_object"}, temperature=temperature)
    assert choice["message"]["content"].startswith("{")
    if choice["finish_reason"] == "stop":
        assert isinstance(json.loads(choice["message"]["content"]), dict)


def test_it_goes_with_soft_prompts_choices_streams_and_logprobs(
    tiny_server: Server, tiny_spec: ModelSpec, tmp_path: Path
) -> None:
    prompt = save_prompt(make_soft_prompt("kv", 5, tiny_spec), tmp_path, "structured")
    assert tiny_server.upload("structured", prompt).status_code == 201
    body = {"messages": QUESTION, "max_tokens": 100, "temperature": 1, "seed": 5, "response_format": as_format(PERSON)}
    body |= {"n": 3, "logprobs": True, "top_logprobs": 2, "soft_prompt": "structured"}
    whole = tiny_server.post("/v1/chat/completions", body).json()["choices"]
    streamed = ["", "", ""]
    with tiny_server.http.stream("POST", "/v1/chat/completions", json=body | {"stream": True}) as reply:
        for line in reply.iter_lines():
            if line.startswith("data: {"):
                for choice in json.loads(line[6:])["choices"]:
                    streamed[choice["index"]] += choice["delta"].get("content") or ""
    assert tiny_server.http.delete("/v1/soft_prompts/structured").status_code == 200
    for choice, text in zip(whole, streamed, strict=True):
        assert choice["message"]["content"] == text
        jsonschema.validate(json.loads(text), PERSON)
        # They are the model's own, so that what the schema ruled out shows among the alternatives.
        assert all(token["logprob"] < 0 for token in choice["logprobs"]["content"])


def test_neighbours_are_not_touched(tiny_server: Server) -> None:
    free = {"messages": QUESTION, "max_tokens": 40, "temperature": 1, "seed": 9}
    alone = tiny_server.post("/v1/chat/completions", free).json()["choices"][0]["message"]["content"]
    with ThreadPoolExecutor(9) as pool:
        bound = [pool.submit(chat, tiny_server, response_format=as_format(PERSON), seed=n) for n in range(8)]
        beside = pool.submit(tiny_server.post, "/v1/chat/completions", free).result().json()
        for one in bound:
            one.result()
    assert beside["choices"][0]["message"]["content"] == alone


def test_tgi_takes_grammars(tiny_server: Server) -> None:
    for grammar in (
        {"type": "json", "value": PERSON},
        {"type": "json", "value": json.dumps(PERSON)},
        {"type": "json_schema", "value": {"name": "person", "schema": PERSON}},
    ):
        parameters = {"grammar": grammar, "max_new_tokens": 100, "do_sample": True, "seed": 3}
        reply = tiny_server.post("/generate", {"inputs": "Who?", "parameters": parameters})
        assert reply.status_code == 200, reply.text
        jsonschema.validate(json.loads(reply.json()["generated_text"]), PERSON)
    parameters = {"grammar": {"type": "regex", "value": "[ab]{5}"}, "max_new_tokens": 20}
    reply = tiny_server.post("/generate", {"inputs": "Who?", "parameters": parameters})
    assert re.fullmatch("[ab]{5}", reply.json()["generated_text"])


def test_a_begun_answer_is_held_to_its_form_as_a_whole(tiny_server: Server) -> None:
    for begun in ('{"name": "', ' {"name":"Ada","age":', '{"name":"Ada","age":3}'):
        last = {"role": "assistant", "content": begun}
        for turn, extra in ((last, {"continue_final_message": True}), (last | {"prefix": True}, {})):
            choice = chat(tiny_server, messages=[*QUESTION, turn], response_format=as_format(PERSON), **extra)
            jsonschema.validate(json.loads(begun + choice["message"]["content"]), PERSON)
    turns = [*QUESTION, {"role": "assistant", "content": '{"name": "A'}]
    body = {"messages": turns, "max_tokens": 200, "seed": 1}
    reply = tiny_server.post(
        "/v1/messages", body | {"output_config": {"format": {"type": "json_schema", "schema": PERSON}}}
    )
    jsonschema.validate(json.loads('{"name": "A' + reply.json()["content"][0]["text"]), PERSON)
    sea = [*QUESTION, {"role": "assistant", "content": "Sure: "}]
    reply = tiny_server.post(
        "/v1/chat/completions", {"messages": sea, "continue_final_message": True, "guided_json": PERSON}
    )
    assert reply.status_code == 400
    assert error_of(reply)["param"] == "guided_json"
    assert "last message begins" in error_of(reply)["message"]


@pytest.mark.parametrize(
    ("fields", "param", "reason"),
    [
        ({"guided_json": {"type": "strng"}}, "guided_json", "Invalid type"),
        ({"guided_json": {"$ref": "#/nowhere"}}, "guided_json", "does not exist"),
        ({"guided_json": {"$ref": "#"}}, "guided_json", "refers to itself"),
        ({"guided_json": False}, "guided_json", "nothing at all"),
        ({"guided_json": {"not": {"type": "string"}}}, "guided_json", "not"),
        ({"guided_json": {"type": "integer", "minimum": 3, "maximum": 1}}, "guided_json", "Unsatisfiable"),
        (
            {"guided_json": {"allOf": [{"type": "integer", "multipleOf": n} for n in PRIMES]}},
            "guided_json",
            "too complex",
        ),
        ({"guided_json": {"enum": [f"number {n}" for n in range(6000)]}}, "guided_json", "characters"),
        ({"guided_regex": "(a"}, "guided_regex", "unclosed group"),
        ({"guided_regex": "(?=a)b"}, "guided_regex", "look-around"),
        ({"guided_grammar": "no grammar at all"}, "guided_grammar", ""),
        ({"structured_outputs": {"regex": "*"}}, "structured_outputs.regex", ""),
        ({"response_format": as_format({"type": 3})}, "response_format.json_schema.schema", ""),
    ],
)
def test_what_cannot_be_followed_is_refused_by_name(
    tiny_server: Server, fields: dict[str, Any], param: str, reason: str
) -> None:
    reply = tiny_server.post("/v1/chat/completions", {"messages": QUESTION, "max_tokens": 5} | fields)
    error = error_of(reply)
    assert reply.status_code == 400
    assert error["param"] == param
    assert reason in error["message"]


def test_openai_parses_into_a_class(tiny_server: Server) -> None:
    from openai import OpenAI

    class Person(BaseModel):
        name: str
        is_tall: bool

    client = OpenAI(base_url=f"{tiny_server.url}/v1", api_key="none")
    for seed in range(5):
        completion = client.chat.completions.parse(
            model=client.models.list().data[0].id,
            messages=[{"role": "user", "content": "Who?"}],
            response_format=Person,
            max_tokens=400,
            temperature=0,
            seed=seed,
            logprobs=False,
        )
        if completion.choices[0].finish_reason == "stop":
            assert isinstance(completion.choices[0].message.parsed, Person)
            return
    pytest.fail("no output has come to its end")
