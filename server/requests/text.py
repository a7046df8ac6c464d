"""Between text and tokens: tokenise, render chats, detokenise incrementally, find stop strings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from softbatch.prompt_store.manifest import Replaces
from softbatch.prompt_store.template import TemplateError, render_chat
from softbatch.server.request_failures import InvalidPrompt, PromptTooLong

PROMPT_TAIL = 8
Message = dict[str, str]


class TextProcessor:
    """Owns the tokenizer. Raises InvalidPrompt for text that cannot become a prompt."""

    def __init__(self, tokenizer: Any, max_model_len: int) -> None:
        self.tokenizer = tokenizer
        self.backend: Tokenizer = tokenizer.backend_tokenizer
        # A tokenizer file may ask for both; a prompt is never cut or filled up here without saying so.
        self.backend.no_truncation()
        self.backend.no_padding()
        self._special = frozenset(tokenizer.all_special_ids)
        # No token stands for more characters than this, so longer texts are refused without tokenising them.
        longest = max(len(token) for token in self.backend.get_vocab())
        self._max_chars = max_model_len * longest
        self._max_model_len = max_model_len
        self._pieces: dict[int, str] = {}

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        if len(text) > self._max_chars:
            raise PromptTooLong(
                f"the prompt has {len(text)} characters; no text that long fits into {self._max_model_len} tokens",
                param="prompt",
            )
        ids: list[int] = self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        text: str = self.backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text

    def render(
        self, messages: Sequence[Message], replaces: Replaces = "nothing", add_generation_prompt: bool = True
    ) -> str:
        """Chat turns as the text the model was trained on; `replaces` says what a soft prompt stands for."""
        if not self.tokenizer.chat_template:
            raise InvalidPrompt("this model has no chat template; use /v1/completions", param="messages")
        try:
            return render_chat(self.tokenizer, list(messages), add_generation_prompt, replaces)
        except TemplateError as error:
            raise InvalidPrompt(str(error), param="messages") from error

    def piece(self, token_id: int) -> str:
        """The text of one token by itself, special ones included; incomplete characters show as U+FFFD."""
        piece = self._pieces.get(token_id)
        if piece is None:
            piece = self._pieces[token_id] = self.decode([token_id], skip_special_tokens=False)
        return piece

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special


class Detokenizer:
    """Text of one output as it grows; characters whose bytes are still incomplete are held back.

    `prompt` is what came before: some tokenizers drop the space in front of a text's first word, and only its
    neighbours tell that the output's first word is not the first.
    """

    def __init__(self, text: TextProcessor, prompt: Sequence[int] = ()) -> None:
        self._text = text
        self._ids = list(prompt[-PROMPT_TAIL:])
        self._stream = DecodeStream(ids=list(self._ids), skip_special_tokens=True)
        self._before = len(text.decode(self._ids))
        self._emitted = 0

    def push(self, token_id: int) -> str:
        self._ids.append(token_id)
        piece = self._stream.step(self._text.backend, token_id) or ""
        self._emitted += len(piece)
        return piece

    def flush(self) -> str:
        """What is still held back when the output ends in the middle of a character."""
        return self._text.decode(self._ids)[self._before + self._emitted :]


class StopStrings:
    """Lets text through until a stop string appears; holds back what could still become one."""

    def __init__(self, stops: Sequence[str], include: bool) -> None:
        self._stops = tuple(stops)
        self._include = include
        self._held = ""
        self.found: str | None = None

    def push(self, piece: str) -> str:
        """The text that may be shown now; afterwards `found` names the stop string if one has appeared."""
        if not self._stops:
            return piece
        self._held += piece
        hits = [(at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if hits:
            # The earliest hit wins; of two at one place the shorter, as it was complete first.
            at, self.found = min(hits, key=lambda hit: (hit[0], len(hit[1])))
            shown, self._held = self._held[: at + len(self.found) * self._include], ""
            return shown
        keep = max((self._overlap(stop) for stop in self._stops), default=0)
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown

    def flush(self) -> str:
        shown, self._held = self._held, ""
        return shown

    def _overlap(self, stop: str) -> int:
        """Length of the longest end of the held text that is a proper start of `stop`."""
        for length in range(min(len(stop) - 1, len(self._held)), 0, -1):
            if self._held.endswith(stop[:length]):
                return length
        return 0
