"""Any tokens, in any steps, behind any prompt: the stream is the whole, and no part of it is the prompt's."""

from __future__ import annotations

import time
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Metaspace, Whitespace

from softbatch.server.requests.detokenizer import Detokenizer, TokenBytes
from softbatch.server.requests.output_text import OutputText
from softbatch.server.requests.text import TextProcessor
from tests.support.tokenizers_of_bytes import as_transformers, byte_fallback, byte_level

TOKENIZERS = {
    "byte-level": byte_level,
    "byte fallback": byte_fallback,
    "unstripped": lambda: byte_fallback(strip=False),
}
TEXTS = st.text(alphabet="aé ß日🙂\n x,'helo\ufffd", max_size=40)
IDS = st.lists(st.integers(0, 299), max_size=30)
PROMPTS = st.lists(st.integers(0, 299), min_size=1, max_size=4)


@pytest.fixture(scope="module", params=TOKENIZERS)
def text(request: pytest.FixtureRequest) -> TextProcessor:
    return TextProcessor(as_transformers(TOKENIZERS[request.param]()), max_model_len=64)


def streamed(text: TextProcessor, ids: Sequence[int], prompt: Sequence[int] = ()) -> str:
    """Checks on the way that each token has its part."""
    detokenizer = Detokenizer(text.tokens, prompt)
    pieces, parts = [], []
    for token in ids:
        piece, settled = detokenizer.push(token)
        pieces.append(piece)
        parts += settled
        assert "".join(pieces).encode().startswith(b"".join(parts)), "a part of what is not shown"
    piece, settled = detokenizer.flush()
    whole = "".join([*pieces, piece])
    assert len([*parts, *settled]) == len(ids)
    assert b"".join([*parts, *settled]) == whole.encode()
    return whole


@settings(max_examples=150, deadline=None, derandomize=True)
@given(words=TEXTS)
def test_a_text_comes_back_whole(text: TextProcessor, words: str) -> None:
    ids = text.encode(words, add_special_tokens=False) if words else []
    assert streamed(text, ids) == text.decode(ids) == text.backend.decode(ids) == words


@settings(max_examples=150, deadline=None, derandomize=True)
@given(ids=IDS, prompt=PROMPTS)
def test_any_tokens_behind_any_prompt(text: TextProcessor, ids: list[int], prompt: list[int]) -> None:
    assert streamed(text, ids) == text.decode(ids)
    if "\ufffd" not in text.decode(ids):
        assert text.decode(ids) == text.backend.decode(ids), "the tokenizer itself writes broken bytes in other numbers"
    hidden = text.tokens.hidden
    raw = b"".join(text.tokens.piece(token)[0] for token in ids if token not in hidden)
    alone = streamed(text, ids, prompt if set(prompt) - hidden else [299 - 2, *prompt, 5])
    if text.tokens.has_byte_fallback:
        assert alone.replace("\ufffd", "") == raw.decode(errors="ignore").replace("\ufffd", "")
    else:
        assert alone == raw.decode(errors="replace") == text.backend.decode(ids), "nothing of the prompt, nothing lost"


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    ids=IDS, stops=st.lists(st.text(alphabet="he é\ufffd", min_size=1, max_size=3), max_size=2), special=st.booleans()
)
def test_parts_of_a_text_that_a_stop_string_cuts(
    text: TextProcessor, ids: list[int], stops: list[str], special: bool
) -> None:
    asked = [*stops, "<|im_end|>"] if special else stops
    output = OutputText(text.tokens, [5], asked, include_stop=False)
    shown, parts = "", []
    for token in ids:
        shown += output.push(token)
        parts += output.take_parts()
        assert shown.encode().startswith(b"".join(parts))
        if output.found is not None:
            break
    else:
        shown += output.finish()
        parts += output.take_parts()
    assert b"".join(parts) == shown.encode()
    whole = streamed(text, ids, [5])
    assert output.found is not None or (shown == whole and not any(stop in whole for stop in stops))
    assert not any(stop in shown for stop in stops)


def test_no_character_is_held_back_longer_than_it_must(text: TextProcessor) -> None:
    smile = [text.tokens.piece(token)[0] for token in text.encode("🙂", add_special_tokens=False)]
    assert b"".join(smile).endswith("🙂".encode())
    detokenizer = Detokenizer(text.tokens, [5])
    one_byte = {text.tokens.piece(token)[0]: token for token in range(258)}
    pieces = [detokenizer.push(one_byte[bytes([byte])])[0] for byte in "é🙂".encode() + b"\xf0\x9fa"]
    assert pieces == ["", "é", "", "", "", "🙂", "", "", "\ufffd" * (1 + text.tokens.has_byte_fallback) + "a"]


def test_a_long_output_costs_what_it_is_long(text: TextProcessor) -> None:
    """Also one of nothing but beginnings of characters."""
    token = next(token for token in range(258) if text.tokens.piece(token)[0] == b"\x80")
    detokenizer = Detokenizer(text.tokens, [5])
    started = time.thread_time()  # others on this machine count for nothing
    shown = sum(len(detokenizer.push(token)[0]) for _ in range(20_000))
    assert shown == 20_000
    assert time.thread_time() - started < 10


def test_the_space_before_the_first_word_is_kept_where_the_tokenizer_drops_it() -> None:
    """As with the tokenizers of Llama 2 and Mistral, which write a space as ▁ and drop a text's first."""
    vocab = {"<unk>": 0, "▁is": 1, "▁Paris": 2, "▁now": 3}
    backend = Tokenizer(WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = Metaspace()
    for decoder in (decoders.Metaspace(), byte_fallback().decoder):
        backend.decoder = decoder
        detokenizer = Detokenizer(TokenBytes(backend), [0, 1])
        assert [detokenizer.push(token)[0] for token in (2, 3)] == [" Paris", " now"]
        first = Detokenizer(TokenBytes(backend))
        assert [first.push(token)[0] for token in (2, 3)] == ["Paris", " now"]


@pytest.mark.parametrize(
    ("decoder", "expected"),
    [(None, "is now is"), (decoders.WordPiece(), "is now is"), (decoders.BPEDecoder(), "isnowis")],
)
def test_other_decoders(decoder: decoders.Decoder | None, expected: str) -> None:
    backend = Tokenizer(WordLevel({"<unk>": 0, "is": 1, "now": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = Whitespace()
    if decoder is not None:
        backend.decoder = decoder
    assert backend.decode([1, 2, 1]) == expected
    detokenizer = Detokenizer(TokenBytes(backend))
    assert "".join(detokenizer.push(token)[0] for token in (1, 2, 1)) == expected


@pytest.mark.parametrize("decoder", [None, decoders.WordPiece(), decoders.BPEDecoder(), decoders.ByteLevel()])
def test_a_token_that_the_tokenizer_lacks_is_no_text(decoder: decoders.Decoder | None) -> None:
    """Embeddings are often filled up to a round number of rows, and noise may choose any of them."""
    backend = Tokenizer(WordLevel({"<unk>": 0, "is": 1, "now": 2}, unk_token="<unk>"))
    if decoder is not None:
        backend.decoder = decoder
    detokenizer = Detokenizer(TokenBytes(backend), [0])
    pieces = [detokenizer.push(token) for token in (1, 99, 2, 99)]
    assert pieces[1] == pieces[3] == ("", (b"",))
    assert "".join(piece for piece, _ in pieces).split() == backend.decode([1, 2]).split()
