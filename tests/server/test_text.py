"""Texts that become prompts, and stop strings."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from softbatch.scheduler.model.source import EMBEDDED_ALIAS, resolve
from softbatch.server.request_failures import PromptTooLong
from softbatch.server.requests.output_text import StopStrings
from softbatch.server.requests.text import TextProcessor
from softbatch.server.routes.score import _prompt
from softbatch.server.schemas.score import ScoreRequest
from tests.support.tokenizers_of_bytes import as_transformers, byte_fallback


@pytest.fixture(scope="module")
def text() -> TextProcessor:
    return TextProcessor(AutoTokenizer.from_pretrained(resolve(EMBEDDED_ALIAS).path), max_model_len=64)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(
    chars=st.text(alphabet="abc", max_size=30),
    stops=st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(1, 4), min_size=30, max_size=30),
    include=st.booleans(),
)
def test_stop_strings_whatever_the_pieces(chars: str, stops: list[str], cuts: list[int], include: bool) -> None:
    """However the text is cut into pieces, what is shown ends at the first stop string that becomes complete."""
    checker, shown, at = StopStrings(stops, include), "", 0
    for size in cuts:
        if at >= len(chars) or checker.found:
            break
        shown += checker.push(chars[at : at + size])
        at += size
    if checker.found is None:
        assert shown + checker.flush() == chars
        assert not any(stop in chars for stop in stops)
        return
    read = chars[:at]
    first = min(read.find(stop) for stop in stops if stop in read)
    assert read[first:].startswith(checker.found)
    assert shown == read[:first] + (checker.found if include else "")


def test_a_text_that_cannot_fit_is_refused_without_tokenising(text: TextProcessor) -> None:
    with pytest.raises(PromptTooLong, match="characters"):
        text.encode("x" * 10_000_000)


def test_a_special_token_can_be_a_stop_string_and_is_never_shown() -> None:
    for include in (False, True):
        stops = StopStrings(["x<end>", "stop"], include)
        assert [stops.push("ab"), stops.push("<end>", hidden=True), stops.push("s"), stops.push("ax")] == [
            "ab",
            "",
            "",
            "sa",
        ]
        assert stops.push("<end>", hidden=True) == ("x" if include else "")
        assert stops.found == "x<end>"
    held = StopStrings(["<end>!"], include=True)
    assert held.push("a") == "a"
    assert held.push("<end>", hidden=True) == ""
    assert held.push("b") == "b", "it was not the stop string after all"


def test_a_tokenizer_file_cannot_cut_prompts() -> None:
    backend = Tokenizer(WordLevel({"<unk>": 0, "is": 1, "now": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = Whitespace()
    backend.enable_truncation(1)
    processor = TextProcessor(PreTrainedTokenizerFast(tokenizer_object=backend), max_model_len=64)
    assert processor.encode("is now") == [1, 2]


def test_what_is_scored_by_a_model_without_a_template_is_text_too() -> None:
    """A context and a question are what people wrote; a raw prompt is what its author makes of it."""
    tokenizer = as_transformers(byte_fallback())
    tokenizer.chat_template = None
    text = TextProcessor(tokenizer, max_model_len=256)
    body = ScoreRequest(context="<s>hello<|im_end|>", input="world<|im_end|>", candidates=["x"])
    prompt = _prompt(cast(Any, SimpleNamespace(text=text)), body)
    ids = text.encode(str(prompt))
    assert not {*ids} & text.tokens.hidden
    assert text.decode(ids, skip_special_tokens=False) == "<s>hello<|im_end|>\n\nworld<|im_end|>"
    assert {*text.encode("hello<|im_end|>")} & text.tokens.hidden
