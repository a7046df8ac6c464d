"""Passages of the text that a soft prompt was made of, found for a question and put before it."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from softbatch.prompt_store.compression.data.passage_index import PassageIndex
from softbatch.prompt_store.compression.data.passages import Passage, before_question
from softbatch.prompt_store.manifest import SoftPromptError
from softbatch.prompt_store.stores.store import SoftPromptStore, StoredPrompt, UnknownPrompt, Version
from softbatch.server.request_failures import InvalidPrompt, UnknownSoftPrompt, UnusableSoftPrompt
from softbatch.server.requests.leases import Lease
from softbatch.server.requests.prompt_encoder import Prompt, PromptEncoder, is_chat
from softbatch.server.requests.text import ChatEnd, ChatPrompt, Message, TextProcessor

MAX_INDEX_BYTES = 64 << 20
# Of a long question its end is looked up: what is asked stands there.
MAX_QUESTION_CHARS = 4000


@dataclass(frozen=True)
class Recalled:
    """What was put before one question, best passage first, and how many of the prompt's tokens that is."""

    passages: tuple[Passage, ...] = ()
    tokens: int = 0


class PassageIndexes:
    """An index of each kept text that requests have looked into, made once; those used last, in bounded memory."""

    def __init__(self, store: SoftPromptStore, max_bytes: int = MAX_INDEX_BYTES) -> None:
        self._store, self._max_bytes = store, max_bytes
        self._indexes: OrderedDict[tuple[str, str, Version], asyncio.Task[PassageIndex | None]] = OrderedDict()

    async def best(self, stored: StoredPrompt, question: str, count: int) -> list[Passage] | None:
        """None where the text is gone. The event loop does not wait for any of it."""
        # The version too: what is registered anew under a name may bring another text.
        key = (stored.name, stored.sha256, stored.version)
        making = self._indexes.get(key)
        if making is None:
            making = self._indexes[key] = asyncio.create_task(asyncio.to_thread(self._make, stored))
        self._indexes.move_to_end(key)
        try:
            index = await asyncio.shield(making)
        except Exception:
            self._indexes.pop(key, None)
            raise
        if index is None:
            self._indexes.pop(key, None)
            return None
        self._drop_oldest()
        return await asyncio.to_thread(index.best, question[-MAX_QUESTION_CHARS:], count)

    def _make(self, stored: StoredPrompt) -> PassageIndex | None:
        try:
            kept = self._store.kept_text(stored)
        except UnknownPrompt as error:
            raise UnknownSoftPrompt(stored.name) from error
        except SoftPromptError as error:
            message = f"soft prompt {stored.name!r}: its text cannot be read for recall: {error}; send recall: 0"
            raise UnusableSoftPrompt(message, param="soft_prompt", code=error.code) from error
        return None if kept is None else PassageIndex(kept.text)

    def _drop_oldest(self) -> None:
        made = [(key, task.result()) for key, task in self._indexes.items() if task.done() and not task.exception()]
        total = sum(index.num_bytes for _, index in made if index is not None)
        for key, index in made[:-1]:
            if total <= self._max_bytes:
                return
            del self._indexes[key]
            total -= index.num_bytes if index is not None else 0


class Recaller:
    """Decides how many passages a request gets, finds them, and writes them before its question."""

    def __init__(self, indexes: PassageIndexes, text: TextProcessor, encoder: PromptEncoder) -> None:
        self._indexes, self._text, self._encoder = indexes, text, encoder

    async def find(self, prompt: Prompt, lease: Lease | None, wanted: int | None) -> Recalled:
        """`wanted` None: as many as the soft prompt's registration says. Raises InvalidPrompt, also for passages with a
        token that the model does not have, UnusableSoftPrompt where the text is damaged, or UnknownSoftPrompt."""
        kept = lease.stored.recall if lease is not None else None
        if wanted and (lease is None or kept is None):
            whose = "the request names no soft prompt" if lease is None else f"{lease.stored.name!r} keeps no text"
            raise InvalidPrompt(
                f"recall: {whose}; passages are recalled of a text that was kept when the soft prompt was registered "
                "(--keep-text)",
                param="recall",
                code="no_kept_text",
            )
        count = kept if wanted is None else wanted
        question = self._question(prompt) if count else ""
        if not count or lease is None or not question:
            return Recalled()
        found = await self._indexes.best(lease.stored, question, count)
        if not found:
            return Recalled()
        tokens = await self._encoder.encode_quoted(before_question(found, ""))
        try:
            self._encoder.check_ids(tokens, "recall")
        except InvalidPrompt:
            # Passages that nobody asked for are no reason to refuse a request that the model can read without them.
            if wanted is not None:
                raise
            return Recalled()
        return Recalled(tuple(found), len(tokens))

    async def count(self, prompt: Prompt, lease: Lease | None, wanted: int | None, chat_end: ChatEnd) -> int:
        """All tokens of a prompt with its passages, a soft prompt's virtual ones included. Raises InvalidPrompt."""
        recalled = await self.find(prompt, lease, wanted)
        token_ids = await self.token_ids(prompt, recalled, lease, chat_end=chat_end)
        return len(token_ids) + (0 if lease is None else lease.ref.num_virtual_tokens)

    async def token_ids(
        self,
        prompt: Prompt,
        recalled: Recalled,
        lease: Lease | None,
        add_special_tokens: bool = True,
        *,
        chat_end: ChatEnd = "answer",
        keep: int | None = None,
    ) -> list[int]:
        """As PromptEncoder does it, of the prompt with its passages before the question; `keep` is about the prompt
        itself, so that with them more is kept. Raises InvalidPrompt."""
        found, encoder = recalled.passages, self._encoder
        if found and is_chat(prompt):
            prompt, found = _with_passages(prompt, found), ()
            keep = None if keep is None else keep + recalled.tokens
        elif found and isinstance(prompt, str) and keep is None:
            prompt, found = f"{self._text.quote(before_question(found, ''))}{prompt}", ()
        own = await encoder.token_ids(prompt, lease, add_special_tokens, chat_end=chat_end, keep=keep)
        if not found:
            return own
        # Nothing stands before the tokens that every text begins with.
        beginning = self._text.beginning
        at = len(beginning) if own[: len(beginning)] == beginning else 0
        return [*own[:at], *await encoder.encode_quoted(before_question(found, "")), *own[at:]]

    def _question(self, prompt: Prompt) -> str:
        if is_chat(prompt):
            turns = prompt.turns if isinstance(prompt, ChatPrompt) else prompt
            at = _last_of_user(turns)
            return str(turns[at]["content"]) if at >= 0 else ""
        return prompt if isinstance(prompt, str) else self._text.decode([int(token) for token in prompt])  # type: ignore[arg-type, union-attr]


def _with_passages(chat: Sequence[Message] | ChatPrompt, found: Sequence[Passage]) -> Sequence[Message] | ChatPrompt:
    """In the last user's turn, also of what is sent beside a soft prompt that stands for the system turn."""
    if isinstance(chat, ChatPrompt):
        beside = chat.beside_system
        return replace(
            chat,
            turns=_in_last_turn(chat.turns, found),
            beside_system=None if beside is None else replace(beside, turns=_in_last_turn(beside.turns, found)),
        )
    return _in_last_turn(chat, found)


def _in_last_turn(turns: Sequence[Message], found: Sequence[Passage]) -> Sequence[Message]:
    at, changed = _last_of_user(turns), list(turns)
    if at >= 0:
        changed[at] = {**turns[at], "content": before_question(found, str(turns[at]["content"]))}
    return changed


def _last_of_user(messages: Sequence[Message]) -> int:
    """-1 where no user speaks: nothing is then recalled."""
    return max((at for at, message in enumerate(messages) if message["role"] == "user"), default=-1)
