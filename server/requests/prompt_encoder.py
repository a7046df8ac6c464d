"""From what a client sent to the token ids the engine gets; generating and scoring share it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import TypeGuard

from softbatch.scheduler.protocol import SamplingParams
from softbatch.server.request_failures import InvalidPrompt, PromptTooLong
from softbatch.server.requests.leases import Lease
from softbatch.server.requests.text import ChatEnd, ChatPrompt, Message, TextProcessor

Prompt = str | Sequence[int] | Sequence[Message] | ChatPrompt
# Texts longer than this are tokenised in a thread, so that they do not stall the event loop. So are those with quotes,
# as the first of them takes long.
LONG_TEXT = 4096


class PromptEncoder:
    """Renders, tokenises and checks prompts. Raises InvalidPrompt for those that cannot be served."""

    def __init__(self, text: TextProcessor, vocab_size: int, max_model_len: int, default_max_tokens: int) -> None:
        self._text = text
        self._vocab_size = vocab_size
        self._max_model_len = max_model_len
        self._default_max_tokens = default_max_tokens

    async def token_ids(
        self,
        prompt: Prompt,
        lease: Lease | None,
        add_special_tokens: bool = True,
        *,
        chat_end: ChatEnd = "answer",
        keep: int | None = None,
    ) -> list[int]:
        """`prompt` is raw text, token ids or chat turns. What the soft prompt stands for is not written again. With
        `keep` at most that many of the last tokens are left, and those of a text's beginning."""
        replaces = lease.stored.manifest.replaces if lease else "nothing"
        if is_chat(prompt):
            # The template writes the special tokens itself.
            token_ids = await self.encode(self._text.render(prompt, replaces, chat_end), add_special_tokens=False)
        elif isinstance(prompt, str):
            token_ids = await self.encode(prompt, add_special_tokens and replaces == "nothing", keep is not None)
        else:
            token_ids = [int(token) for token in prompt]  # type: ignore[arg-type, union-attr]
        if not token_ids:
            raise InvalidPrompt("the prompt is empty; give at least one token", param="prompt")
        self.check_ids(token_ids, "prompt")
        return token_ids if keep is None or len(token_ids) <= keep else self._end_of(token_ids, keep)

    def _end_of(self, token_ids: list[int], keep: int) -> list[int]:
        beginning = self._text.beginning
        if len(beginning) < keep and token_ids[: len(beginning)] == beginning:
            return beginning + token_ids[len(beginning) - keep :]
        return token_ids[-keep:]

    async def encode(self, text: str, add_special_tokens: bool, only_end: bool = False) -> list[int]:
        if len(text) > LONG_TEXT or self._text.has_quotes(text):
            return await asyncio.to_thread(self._text.encode, text, add_special_tokens, only_end)
        return self._text.encode(text, add_special_tokens, only_end)

    def bad_words(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """The tokens of each word as a text begins with it, and as it follows others; those that the model does not
        have need no ban."""
        found = [self._text.encode(space + word.lstrip(), False) for word in words for space in ("", " ")]
        return tuple(dict.fromkeys(tuple(tokens) for tokens in found if tokens and max(tokens) < self._vocab_size))

    async def encode_quoted(self, text: str) -> list[int]:
        """Text alone: no control token is made of it."""
        return await self.encode(self._text.quote(text), add_special_tokens=False)

    def room(
        self, lease: Lease | None, prompt: int, wanted: int | None, least_wanted: int = 0, *, may_clip: bool = False
    ) -> int:
        """How many tokens may be generated: `wanted`, or the server's default, but at least `least_wanted`, if so many
        fit, or all that do. Raises PromptTooLong when that is too many; with `may_clip` only if none fits."""
        virtual = lease.ref.num_virtual_tokens if lease else 0
        left = self._max_model_len - virtual - prompt
        least = 1 if wanted is None else min(wanted, 1) if may_clip else wanted
        if left < least:
            parts = f"{virtual} virtual tokens + " if virtual else ""
            output = "at least 1 output token" if wanted is None else f"{wanted} output tokens"
            raise PromptTooLong(
                f"{parts}{prompt} prompt tokens + {output} exceed the longest sequence of {self._max_model_len} "
                "tokens; shorten the prompt or ask for fewer tokens",
                param="prompt" if left < 1 else "max_tokens",
            )
        return min(left, max(self._default_max_tokens, least_wanted)) if wanted is None else min(left, wanted)

    def most_that_fit(self, lease: Lease | None, wanted: int | None) -> int:
        """Prompt tokens that leave room for so many others, or for the server's default."""
        virtual = lease.ref.num_virtual_tokens if lease else 0
        return max(1, self._max_model_len - virtual - (self._default_max_tokens if wanted is None else wanted))

    def check_params(self, params: SamplingParams) -> None:
        """Raises InvalidPrompt for a token that the model does not have."""
        self.check_ids(params.stop_token_ids, "stop_token_ids")
        self.check_ids(params.allowed_token_ids, "allowed_token_ids")
        self.check_ids(tuple(params.logit_bias), "logit_bias")

    def check_ids(self, token_ids: Sequence[int], param: str) -> None:
        """Raises InvalidPrompt for a token that the tokenizer may have, but the model has no embedding for."""
        if not token_ids or (max(token_ids) < self._vocab_size and min(token_ids) >= 0):
            return
        wrong = next(token for token in token_ids if not 0 <= token < self._vocab_size)
        raise InvalidPrompt(
            f"the model has no token {wrong}{self._text.named(wrong)}: its token ids are 0 to {self._vocab_size - 1}",
            param=param,
            code="token_id",
        )


def is_chat(prompt: Prompt) -> TypeGuard[Sequence[Message] | ChatPrompt]:
    if isinstance(prompt, str | ChatPrompt):
        return isinstance(prompt, ChatPrompt)
    return len(prompt) > 0 and isinstance(prompt[0], Mapping)
