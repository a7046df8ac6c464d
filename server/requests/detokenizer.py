"""From tokens to text as they come: a token is bytes, and text is what of them makes whole characters."""

from __future__ import annotations

import codecs
import json
import re
from collections import deque
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

from tokenizers import Tokenizer

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# Byte-level vocabularies write printable bytes as they are, and the others as the characters from U+0100 on.
_PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_OTHERS = (byte for byte in range(0x100) if byte not in _PRINTABLE)
BYTE_OF = {chr(byte): byte for byte in _PRINTABLE} | {chr(0x100 + at): byte for at, byte in enumerate(_OTHERS)}
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# Decoders under which a token says the same behind any other; of them only these change what begins a text.
_FREE_OF_CONTEXT = {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace", "WordPiece"}


class TokenBytes:
    """What each token adds to a text that it does not begin, as UTF-8 bytes; owns the tokenizer's decoder.

    A token may be part of a character, or of none. `hidden` are the special tokens, which are not text.
    """

    def __init__(self, backend: Tokenizer) -> None:
        self._backend = backend
        self._decoder = backend.decoder
        steps = _steps(self._decoder)
        kinds = {step["type"] for step in steps}
        self.is_byte_level = "ByteLevel" in kinds
        self.has_byte_fallback = "ByteFallback" in kinds and not self.is_byte_level
        # Of every other decoder it is asked what two tokens say together.
        self.depends_on_previous = not self.is_byte_level and not (kinds and kinds <= _FREE_OF_CONTEXT)
        strips = [step for step in steps if step["type"] == "Strip"]
        self.stripped = (strips[0]["content"], int(strips[0]["start"])) if strips else ("", 0)
        names = {i: token.content for i, token in backend.get_added_tokens_decoder().items() if token.special}
        self.hidden = frozenset(names)
        self._names = names
        self.hidden_in = lru_cache(maxsize=1024)(self._hidden_in)
        self._known: dict[int, tuple[bytes, str | None]] = {}

    def piece(self, token_id: int) -> tuple[bytes, str | None]:
        """The bytes, and the text they are; None if they are none by themselves."""
        known = self._known.get(token_id)
        if known is None:
            known = self._known[token_id] = _with_text(self._bytes(token_id))
        return known

    def shown(self, token_id: int) -> str:
        """The token by itself; parts of characters show as U+FFFD."""
        raw, text = self.piece(token_id)
        return raw.decode(errors="replace") if text is None else text

    def _hidden_in(self, text: str) -> dict[int, str]:
        """The special tokens that a text spells out."""
        return {token_id: name for token_id, name in self._names.items() if name in text}

    def first(self, token_id: int) -> tuple[bytes, str | None]:
        """The same for the token that begins a text."""
        token = self._backend.id_to_token(token_id)
        if self.is_byte_level or self.stripped[1] or token is None or self._is_byte(token):
            return self.piece(token_id)
        return _with_text(self._decode([token]).encode())

    def behind(self, previous: int, token_id: int) -> tuple[bytes, str | None]:
        """The same for a token whose text depends on the one before."""
        one, two = (self._backend.id_to_token(token) for token in (previous, token_id))
        return (b"", "") if two is None else _with_text(self._added([one or ""], two).encode())

    def _bytes(self, token_id: int) -> bytes:
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        if self.is_byte_level:
            known = [BYTE_OF.get(char) for char in token]
            whole = [byte for byte in known if byte is not None]
            return bytes(whole) if len(whole) == len(known) else token.encode()
        if self._is_byte(token):
            return bytes([int(token[3:5], 16)])
        return self._added(["a"], token).encode()

    def _is_byte(self, token: str) -> bool:
        return self.has_byte_fallback and _BYTE_TOKEN.fullmatch(token) is not None

    def _added(self, before: list[str], token: str) -> str:
        without, both = self._decode(before), self._decode([*before, token])
        return both[len(without) :] if both.startswith(without) else both

    def _decode(self, tokens: list[str]) -> str:
        text: str = self._decoder.decode(tokens) if self._decoder is not None else " ".join(tokens)
        return text


class Detokenizer:
    """Text of one output as it grows, whatever came before it; bytes that are no character yet are held back.

    `prompt` is what came before: some tokenizers drop the space in front of a text's first word. Each token's part
    of the text, in UTF-8, is told too; together the parts are the text. `shown` are special tokens that are text here.
    """

    def __init__(
        self,
        tokens: TokenBytes,
        prompt: Sequence[int] = (),
        skip_special_tokens: bool = True,
        shown: frozenset[int] = frozenset(),
    ) -> None:
        self._tokens = tokens
        hidden = tokens.hidden - shown if shown else tokens.hidden
        self._hidden = hidden if skip_special_tokens else frozenset()
        self._previous = next((token for token in reversed(prompt) if token not in self._hidden), None)
        self._to_strip = tokens.stripped[1] if self._previous is None else 0
        self._pending = b""
        self._waiting: deque[_WaitingToken] = deque()

    def push(self, token_id: int) -> tuple[str, Sequence[bytes]]:
        """The text that this completes, and the parts of the tokens that are settled by it, oldest first."""
        raw, text = (b"", "") if token_id in self._hidden else self._piece(token_id)
        if self._waiting or text is None:
            self._pending += raw
            self._waiting.append(_WaitingToken(len(raw)))
            return self._settle(final=False)
        if self._to_strip and text:
            text = self._strip(text)
            raw = text.encode()
        return text, (raw,)

    def flush(self) -> tuple[str, Sequence[bytes]]:
        """What is still held back when the output ends in the middle of a character."""
        return self._settle(final=True)

    def _piece(self, token_id: int) -> tuple[bytes, str | None]:
        previous, self._previous = self._previous, token_id
        if previous is None:
            return self._tokens.first(token_id)
        if self._tokens.depends_on_previous:
            return self._tokens.behind(previous, token_id)
        return self._tokens.piece(token_id)

    def _strip(self, text: str) -> str:
        content = self._tokens.stripped[0]
        while self._to_strip and text.startswith(content):
            text = text[len(content) :]
            self._to_strip -= 1
        if text:
            self._to_strip = 0
        return text

    def _settle(self, final: bool) -> tuple[str, Sequence[bytes]]:
        texts, settled, at = [], [], 0
        for count, text in _characters(self._pending, final, self._tokens.has_byte_fallback):
            texts.append(text)
            self._share_out(self._pending[at : at + count], text)
            at += count
        self._pending = self._pending[at:]
        while self._waiting and not self._waiting[0].left:
            settled.append(bytes(self._waiting.popleft().part))
        if texts:
            self._to_strip = 0
        return "".join(texts), settled

    def _share_out(self, raw: bytes, text: str) -> None:
        """Give each waiting token its part of what `raw`, the first of their bytes, became; the first of several that
        are broken gets the U+FFFD for all of them."""
        is_broken, left = text.encode() != raw, len(raw)
        for token in self._waiting:
            count = min(token.left, left)
            if count and not (is_broken and left < len(raw)):
                at = len(raw) - left
                token.part += text.encode() if is_broken else raw[at : at + count]
            token.left -= count
            left -= count
            if not left:
                return


class _WaitingToken:
    """A token `left` bytes of which are not text yet; `part` is what the others became."""

    __slots__ = ("left", "part")

    def __init__(self, left: int) -> None:
        self.left = left
        self.part = bytearray()


def decode_whole(tokens: TokenBytes, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
    """The text of all of them, as a stream of them would have given it."""
    detokenizer = Detokenizer(tokens, (), skip_special_tokens)
    pieces = [detokenizer.push(token_id)[0] for token_id in token_ids]
    return "".join(pieces) + detokenizer.flush()[0]


def _characters(raw: bytes, final: bool, one_for_each_byte: bool) -> Iterator[tuple[int, str]]:
    """(bytes, their text) from the start on; without `final` the beginning of a character at the end is left."""
    while raw:
        try:
            text, count = codecs.utf_8_decode(raw, "strict", final)
        except UnicodeDecodeError as error:
            if error.start:
                yield error.start, raw[: error.start].decode()
            broken = error.end - error.start
            yield from [(1, REPLACEMENT)] * broken if one_for_each_byte else [(broken, REPLACEMENT)]
            raw = raw[error.end :]
            continue
        if count:
            yield count, text
        return


def _with_text(raw: bytes) -> tuple[bytes, str | None]:
    try:
        return raw, raw.decode()
    except UnicodeDecodeError:
        return raw, None


def _steps(decoder: Any) -> list[dict[str, str]]:
    """The decoder's parts, in order; none for one that does not say what it is."""
    try:
        state = json.loads(decoder.__getstate__())
    except (TypeError, ValueError):
        return []
    pending, found = [state], []
    while pending:
        step = pending.pop(0)
        if isinstance(step, dict):
            pending = step.get("decoders", []) + pending
            if "decoders" not in step:
                found.append(step)
    return found
