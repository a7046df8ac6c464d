"""Incremental detokenising and stop strings."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.decoders import Metaspace as MetaspaceDecoder
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Metaspace
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from softbatch.scheduler.model.source import EMBEDDED_ALIAS, resolve
from softbatch.server.request_failures import PromptTooLong
from softbatch.server.requests.text import Detokenizer, StopStrings, TextProcessor


@pytest.fixture(scope="module")
def text() -> TextProcessor:
    return TextProcessor(AutoTokenizer.from_pretrained(resolve(EMBEDDED_ALIAS).path), max_model_len=64)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(words=st.text(alphabet="aé ß日🙂\n\t x'", max_size=40))
def test_pieces_add_up_to_the_whole(text: TextProcessor, words: str) -> None:
    ids = text.encode(words, add_special_tokens=False) if words else []
    detokenizer = Detokenizer(text)
    pieces = [detokenizer.push(token) for token in ids]
    assert "".join(pieces) + detokenizer.flush() == text.decode(ids)
    assert not any("�" in piece for piece in pieces)


def test_an_output_cut_in_the_middle_of_a_character_is_flushed(text: TextProcessor) -> None:
    ids = text.encode("🙂", add_special_tokens=False)
    assert len(ids) > 1
    detokenizer = Detokenizer(text)
    assert "".join(detokenizer.push(token) for token in ids[:-1]) == ""
    assert detokenizer.flush() == text.decode(ids[:-1])


def test_special_tokens_are_not_text(text: TextProcessor) -> None:
    detokenizer = Detokenizer(text)
    eos = text.tokenizer.eos_token_id
    assert detokenizer.push(eos) == ""
    assert text.is_special(eos)
    assert text.piece(eos) == "<|im_end|>"


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


def test_the_space_before_the_first_word_is_kept_where_the_tokenizer_drops_it() -> None:
    """As with the tokenizers of Llama 2 and Mistral, which write a space as ▁ and drop a text's first."""
    vocab = {"<unk>": 0, "▁is": 1, "▁Paris": 2, "▁now": 3}
    backend = Tokenizer(WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = Metaspace()
    backend.decoder = MetaspaceDecoder()
    backend.enable_truncation(1)
    processor = TextProcessor(PreTrainedTokenizerFast(tokenizer_object=backend), max_model_len=64)
    assert processor.encode("is Paris now") == [1, 2, 3]  # whatever the tokenizer's file says of truncation
    detokenizer = Detokenizer(processor, [0, 1])
    assert [detokenizer.push(2), detokenizer.push(3), detokenizer.flush()] == [" Paris", " now", ""]
