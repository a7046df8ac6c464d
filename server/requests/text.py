"""Between text and tokens: tokenise, render chats, and say what tokens mean."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import takewhile
from typing import Any, Literal

from tokenizers import Tokenizer

from softbatch.prompt_store.control_tokens import ControlTokens
from softbatch.prompt_store.manifest import Replaces
from softbatch.prompt_store.template import TemplateError, render_chat
from softbatch.server.request_failures import InvalidPrompt, PromptTooLong, shown
from softbatch.server.requests.detokenizer import TokenBytes, decode_whole

Message = Mapping[str, Any]
# What a rendered chat ends with: the beginning of an answer, the last turn, or that turn without its end.
ChatEnd = Literal["answer", "turn", "open turn"]


@dataclass(frozen=True)
class ChatPrompt:
    """Chat turns, and what else the template is given, such as tools. `beside_system` are both if a soft prompt stands
    for the system turn."""

    turns: Sequence[Message]
    fields: Mapping[str, Any] = field(default_factory=dict)
    beside_system: ChatPrompt | None = None


class TextProcessor:
    """Owns the tokenizer. Raises InvalidPrompt for text that cannot become a prompt."""

    def __init__(self, tokenizer: Any, max_model_len: int) -> None:
        self.tokenizer = tokenizer
        self.backend: Tokenizer = tokenizer.backend_tokenizer
        # A tokenizer file may ask for both; a prompt is never cut or filled up here without saying so.
        self.backend.no_truncation()
        self.backend.no_padding()
        self.tokens = TokenBytes(self.backend)
        self._control = ControlTokens(tokenizer)
        self._special = self.tokens.hidden | frozenset(tokenizer.all_special_ids)
        # No token stands for more characters than this, so longer texts are refused without tokenising them.
        longest = max(len(token) for token in self.backend.get_vocab())
        self._max_chars = max_model_len * longest
        self._max_model_len = max_model_len

    def encode(self, text: str, add_special_tokens: bool = True, only_end: bool = False) -> list[int]:
        """Control tokens that the text spells out become control tokens, unless they are quoted. With `only_end` what
        is too much at the start of an unquoted text may be left out."""
        has_quotes = self.has_quotes(text)
        length = len(self._control.unquote(text)) if has_quotes else len(text)
        if only_end and not has_quotes:
            text = text[-self._max_chars :]
        elif length > self._max_chars:
            raise PromptTooLong(
                f"the prompt has {length} characters; no text that long fits into {self._max_model_len} tokens",
                param="prompt",
            )
        if not has_quotes:
            ids: list[int] = self.backend.encode(text, add_special_tokens=add_special_tokens).ids
            return ids
        try:
            return self._control.encode(text, add_special_tokens)
        except TemplateError as error:
            raise InvalidPrompt(str(error), param="messages") from error

    @cached_property
    def beginning(self) -> list[int]:
        """The tokens that the tokenizer puts in front of every text."""
        empty, word = (self.backend.encode(text, add_special_tokens=True).ids for text in ("", "a"))
        return [one for one, _ in takewhile(lambda pair: pair[0] == pair[1], zip(empty, word, strict=False))]

    def quote(self, text: str) -> str:
        """For `encode`: the text with its control tokens quoted."""
        return self._control.quote(text)

    def has_quotes(self, text: str) -> bool:
        return self._control.has_quotes(text)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """As the same tokens come out of a stream."""
        if self.tokens.has_byte_fallback:
            return decode_whole(self.tokens, token_ids, skip_special_tokens)
        text: str = self.backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text

    def render(
        self, chat: Sequence[Message] | ChatPrompt, replaces: Replaces = "nothing", end: ChatEnd = "answer"
    ) -> str:
        """Chat turns as the text the model was trained on, with what people wrote quoted; `replaces` says what a soft
        prompt stands for."""
        if not isinstance(chat, ChatPrompt):
            chat = ChatPrompt(chat)
        if replaces == "system" and chat.beside_system is not None:
            chat = chat.beside_system
        if not self.tokenizer.chat_template:
            raise InvalidPrompt(
                "this model has no chat template; use /v1/completions, or start the server with --chat-template FILE",
                param="messages",
            )
        try:
            turns, fields = self._control.quote_turns(chat.turns), self._control.quote_all(chat.fields)
            if end != "open turn":
                return render_chat(self.tokenizer, turns, end == "answer", replaces, fields)
            mark = secrets.token_hex(16)
            turns[-1] = {**turns[-1], "content": (turns[-1].get("content") or "") + mark}
            rendered, found, _ = render_chat(self.tokenizer, turns, False, replaces, fields).rpartition(mark)
        except TemplateError as error:
            raise InvalidPrompt(str(error), param="messages") from error
        if not found:
            message = "the model's chat template drops the last message, which cannot be continued"
            raise InvalidPrompt(message, param="continue_final_message")
        return rendered

    def piece(self, token_id: int) -> str:
        """The text of one token by itself, special ones included; incomplete characters show as U+FFFD."""
        return self.tokens.shown(token_id)

    def named(self, token_id: int) -> str:
        """How the tokenizer writes a token, to stand behind its id in a message; empty if it has none of this id."""
        token = self.backend.id_to_token(token_id) if 0 <= token_id < 2**32 else None
        return "" if token is None else f" ({shown(token)})"

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special
