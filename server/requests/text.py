"""Between text and tokens: tokenise, render chats, and say what tokens mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tokenizers import Tokenizer

from softbatch.prompt_store.control_tokens import ControlTokens
from softbatch.prompt_store.manifest import Replaces
from softbatch.prompt_store.template import TemplateError, render_chat
from softbatch.server.request_failures import InvalidPrompt, PromptTooLong, shown
from softbatch.server.requests.detokenizer import TokenBytes, decode_whole

Message = Mapping[str, Any]


@dataclass(frozen=True)
class Conversation:
    """Chat turns, and what else the template is given, such as tools. `beside_system` are both if a soft prompt stands
    for the system turn."""

    turns: Sequence[Message]
    fields: Mapping[str, Any] = field(default_factory=dict)
    beside_system: Conversation | None = None


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

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Control tokens that the text spells out become control tokens, unless they are quoted."""
        has_quotes = self.has_quotes(text)
        length = len(self._control.unquote(text)) if has_quotes else len(text)
        if length > self._max_chars:
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
        self,
        chat: Sequence[Message] | Conversation,
        replaces: Replaces = "nothing",
        add_generation_prompt: bool = True,
    ) -> str:
        """Chat turns as the text the model was trained on, with what people wrote quoted; `replaces` says what a soft
        prompt stands for."""
        if not isinstance(chat, Conversation):
            chat = Conversation(chat)
        if replaces == "system" and chat.beside_system is not None:
            chat = chat.beside_system
        if not self.tokenizer.chat_template:
            raise InvalidPrompt("this model has no chat template; use /v1/completions", param="messages")
        try:
            turns, fields = self._control.quote_turns(chat.turns), self._control.quote_all(chat.fields)
            return render_chat(self.tokenizer, turns, add_generation_prompt, replaces, fields)
        except TemplateError as error:
            raise InvalidPrompt(str(error), param="messages") from error

    def piece(self, token_id: int) -> str:
        """The text of one token by itself, special ones included; incomplete characters show as U+FFFD."""
        return self.tokens.shown(token_id)

    def named(self, token_id: int) -> str:
        """How the tokenizer writes a token, to stand behind its id in a message; empty if it has none of this id."""
        token = self.backend.id_to_token(token_id) if 0 <= token_id < 2**32 else None
        return "" if token is None else f" ({shown(token)})"

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special
