"""A grammar follows its sequence: neighbours, preemption, resumption and steps in flight change nothing."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import msgspec
import numpy as np
import pytest
from llguidance import LLMatcher

from softbatch.scheduler.engine.engine import Engine
from softbatch.scheduler.model.sampling.grammar import GrammarError, GrammarMasks
from softbatch.scheduler.protocol import AddRequest
from softbatch.scheduler.sequence import Sequence
from tests.support.engines import build, check_empty, drain, make_request, run, tokens_of
from tests.support.models import Reference, load_reference
from tests.support.schemas import SCHEMAS

BAD = LLMatcher.grammar_from_lark('start: "x" more\nmore: "y" more')  # no text ever ends it


@pytest.fixture(scope="module")
def tiny_llama(tiny_models: dict[str, str]) -> Reference:
    return load_reference(tiny_models["llama"])


def bound(name: str, reference: Reference, schema: dict[str, Any], **params: object) -> AddRequest:
    ids = reference.tokenizer(f"Describe number {name}")["input_ids"]
    grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides={"whitespace_flexible": False})
    values = {"max_tokens": 60, "temperature": 1.0, "seed": len(name), "grammar": grammar} | params
    return make_request(name, ids, **values)


def requests(reference: Reference) -> list[AddRequest]:
    """Half of them may say anything."""
    return [
        bound(f"r{index}", reference, schema, seed=index, **({} if index % 2 else {"grammar": "", "max_tokens": 20}))
        for index, schema in enumerate(SCHEMAS[:14])
    ]


def roomy(reference: Reference, **overrides: object) -> Engine:
    return build(reference.path, num_blocks=300, max_model_len=128, **overrides)[0]


@pytest.fixture(scope="module")
def alone(tiny_llama: Reference) -> dict[str, list[int]]:
    """Each request's output by itself."""
    engine = roomy(tiny_llama)
    return {one.request_id: tokens_of(drain(engine, [one])[one.request_id]) for one in requests(tiny_llama)}


def test_outputs_follow_their_schemas(tiny_llama: Reference, alone: dict[str, list[int]]) -> None:
    finished = 0
    for request, schema in zip(requests(tiny_llama), SCHEMAS, strict=False):
        output = alone[request.request_id]
        if request.params.grammar and output[-1] == tiny_llama.tokenizer.eos_token_id:
            finished += 1
            jsonschema.validate(json.loads(tiny_llama.tokenizer.decode(output[:-1])), schema)
    assert finished > 3


@pytest.mark.parametrize("async_scheduling", ["off", "on"])
def test_company_chunks_and_preemption_change_nothing(
    tiny_llama: Reference, alone: dict[str, list[int]], async_scheduling: str
) -> None:
    engine, _ = build(
        tiny_llama.path,
        num_blocks=22,
        block_size=4,
        max_batch_size=7,
        max_batch_tokens=19,
        max_model_len=84,
        max_queue_size=100,
        async_scheduling=async_scheduling,
    )
    received, preemptions, _ = run(engine, requests(tiny_llama))
    assert preemptions > 0
    assert received == alone
    check_empty(engine)


def test_a_greedy_choice_that_its_grammar_allows_needs_no_mask(
    tiny_llama: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what comes of it is what the masks would have left."""
    anything = LLMatcher.grammar_from_lark(r"start: /(.|\n){0,40}/")
    wanted = [
        bound(f"r{index}", tiny_llama, schema, temperature=0.0, **params)
        for index, schema in enumerate(SCHEMAS[:5])
        for params in [({}, {"logprobs": 2}, {"presence_penalty": 1.0}, {"bad_words": ((5,), (40, 41))}, {})[index]]
    ]
    wanted.append(bound("free", tiny_llama, {}, temperature=0.0, grammar=anything, max_tokens=20))
    masked: list[str] = []
    next_masks = GrammarMasks.next_masks

    def noted(masks: GrammarMasks, sequences: list[Sequence]) -> dict[str, np.ndarray | GrammarError]:
        masked.extend(sequence.request_id for sequence in sequences)
        return next_masks(masks, sequences)

    monkeypatch.setattr(GrammarMasks, "next_masks", noted)
    outputs = {name: tokens_of(found) for name, found in drain(roomy(tiny_llama), wanted).items()}
    assert masked.count("free") < len(outputs["free"]) // 2
    monkeypatch.setattr(GrammarMasks, "allow", lambda *_: False)
    masked.clear()
    assert {name: tokens_of(found) for name, found in drain(roomy(tiny_llama), wanted).items()} == outputs
    assert masked.count("free") == len(outputs["free"])


def test_a_resumed_sequence_goes_on_where_it_was(tiny_llama: Reference, alone: dict[str, list[int]]) -> None:
    request = next(r for r in requests(tiny_llama) if r.params.grammar and len(alone[r.request_id]) > 8)
    output = alone[request.request_id]
    for delivered in (1, 5, len(output) - 1):
        ids = request.token_ids + output[:delivered]
        again = msgspec.structs.replace(request, token_ids=ids, num_delivered=delivered)
        assert tokens_of(drain(roomy(tiny_llama), [again])[request.request_id]) == output[delivered:]


def test_a_begun_output_goes_on_as_the_grammar_has_it(tiny_llama: Reference) -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"enum": ["Ann", "Änne"]}, "age": {"type": "integer", "minimum": 10, "maximum": 99}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    beginnings = ["", "{", '{"na', '{"name":"Än', '{"name":"Ann","age":4', '{"name":"Ann","age":42}']
    made = drain(
        roomy(tiny_llama),
        [bound(f"r{at}", tiny_llama, schema, begun=begun, seed=at) for at, begun in enumerate(beginnings)]
        + [bound("bad", tiny_llama, schema, begun='{"name": "Bob')],
    )
    for at, begun in enumerate(beginnings):
        tokens = tokens_of(made[f"r{at}"])
        assert tokens[-1] == tiny_llama.tokenizer.eos_token_id
        jsonschema.validate(json.loads(begun + tiny_llama.tokenizer.decode(tokens[:-1])), schema)
    assert len(tokens_of(made["r5"])) == 1
    assert "no beginning" in (made["bad"][-1].error or "")


def test_a_grammar_that_cannot_be_followed_fails_its_own_sequence(
    tiny_llama: Reference, alone: dict[str, list[int]]
) -> None:
    bad = bound("bad", tiny_llama, {}, grammar=BAD)
    good = requests(tiny_llama)[:4]
    outputs = drain(roomy(tiny_llama), [bad, *good])
    assert "grammar" in (outputs["bad"][-1].error or "")
    for request in good:
        assert tokens_of(outputs[request.request_id]) == alone[request.request_id]


def test_logprobs_are_the_models_own(tiny_llama: Reference) -> None:
    """A choice between two words leaves both improbable, and the most probable ones are still told."""
    grammar = LLMatcher.grammar_from_lark('start: "yes" | "no"')
    request = bound("r", tiny_llama, {}, grammar=grammar, logprobs=5, temperature=0.0)
    free = msgspec.structs.replace(request, params=msgspec.structs.replace(request.params, grammar="", max_tokens=1))
    first = drain(roomy(tiny_llama), [request])["r"][0].logprobs
    same = drain(roomy(tiny_llama), [free])["r"][0].logprobs
    assert first is not None
    assert same is not None
    assert first[0].top_ids == same[0].top_ids
    assert first[0].top_logprobs == pytest.approx(same[0].top_logprobs)
    assert first[0].logprob < same[0].logprob
