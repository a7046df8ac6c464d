"""Grammars over tokenizers of other kinds than the tiny models have: whatever is drawn follows them."""

from __future__ import annotations

import json

import jsonschema
import numpy as np
import pytest
from llguidance import LLMatcher
from tokenizers import Tokenizer

from softbatch.scheduler.model.sampling.constraints import Constraints
from softbatch.scheduler.model.sampling.grammar import GrammarMasks, grammar_tokenizer
from softbatch.scheduler.protocol import AddRequest, SamplingParams
from softbatch.scheduler.sequence import Sequence
from tests.support.schemas import SCHEMAS
from tests.support.tokenizers_of_bytes import byte_fallback, byte_level

END = "<|im_end|>"
PROMPT = [1, 2]


def drawn(tokenizer: Tokenizer, grammar: str, seed: int, spare_logits: int = 0) -> str | None:
    """A text of the grammar, each token drawn evenly from those allowed; None if it finds no end."""
    size, end = tokenizer.get_vocab_size() + spare_logits, tokenizer.token_to_id(END)
    masks = GrammarMasks(lambda: grammar_tokenizer(tokenizer, size, [end]), size)
    sequence = Sequence(
        AddRequest(request_id="r", token_ids=list(PROMPT), params=SamplingParams(grammar=grammar)), arrival=0
    )
    rng = np.random.default_rng(seed)
    for _ in range(400):
        allowed = np.unpackbits(masks.next_masks([sequence])["r"].view(np.uint8), count=size, bitorder="little")
        token = int(rng.choice(np.flatnonzero(allowed)))
        if token == end:
            return str(tokenizer.decode(sequence.tokens[len(PROMPT) :]))
        sequence.tokens.append(token)
    return None


@pytest.mark.parametrize("spare_logits", [0, 37], ids=["", "more logits than tokens"])
@pytest.mark.parametrize("kind", ["byte level", "byte fallback", "byte fallback with Strip"])
def test_texts_follow_their_schemas(kind: str, spare_logits: int) -> None:
    tokenizer = byte_level() if kind == "byte level" else byte_fallback(strip="Strip" in kind)
    finished = 0
    for seed, schema in enumerate(SCHEMAS[:25]):
        grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides={"whitespace_flexible": False})
        text = drawn(tokenizer, grammar, seed, spare_logits)
        if text is not None:
            finished += 1
            jsonschema.validate(json.loads(text), schema)
    assert finished > 20


@pytest.mark.parametrize("kind", ["byte level", "byte fallback"])
def test_asking_for_one_token_agrees_with_the_mask(kind: str) -> None:
    """Of several tokens that are the same bytes a mask has one."""
    tokenizer = byte_level() if kind == "byte level" else byte_fallback(strip=False)
    size, end = tokenizer.get_vocab_size() + 37, tokenizer.token_to_id(END)
    tokens = grammar_tokenizer(tokenizer, size, [end])
    spelt = [tokens.decode_bytes([token]) for token in range(size)]
    masks = GrammarMasks(lambda: tokens, size)
    rng = np.random.default_rng(4)
    found = set()
    for schema in SCHEMAS[:12]:
        grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema))
        request = AddRequest(request_id="r", token_ids=list(PROMPT), params=SamplingParams(grammar=grammar))
        sequence = Sequence(request, arrival=0)
        for _ in range(30):
            row = masks.next_masks([sequence])["r"]
            allowed = np.unpackbits(row.view(np.uint8), count=size, bitorder="little").astype(bool)
            next_token = int(rng.choice(np.flatnonzero(allowed)))
            for token in {*rng.integers(0, size, 50).tolist(), next_token} - {end}:
                may_come = any(allowed[other] for other in range(size) if spelt[other] == spelt[token])
                assert masks.allow(sequence, token) == may_come
                found.add(may_come)
            assert not masks.allow(sequence, end), "the mask tells"
            if next_token == end:
                break
            sequence.tokens.append(next_token)
    assert found == {True, False}


def test_barred_tokens_come_only_if_nothing_else_is_left() -> None:
    tokenizer = byte_level()
    end = tokenizer.token_to_id(END)
    masks = GrammarMasks(lambda: grammar_tokenizer(tokenizer, tokenizer.get_vocab_size(), [end]), end + 1)
    for grammar, may_go_on in ((LLMatcher.grammar_from_regex("a*"), True), (LLMatcher.grammar_from_regex(""), False)):
        request = AddRequest(
            request_id="r",
            token_ids=list(PROMPT),
            params=SamplingParams(grammar=grammar, min_tokens=1, ending_ids=(end,)),
        )
        constraint = Constraints(masks).of([Sequence(request, 0)], end + 1, {})["r"]
        bits = np.unpackbits(constraint.mask.view(np.uint8), bitorder="little")
        assert bool(bits[end]) is not may_go_on
