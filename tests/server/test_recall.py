"""Indexes of kept texts: made once for all who wait, bounded in memory; and where passages stand in a conversation."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from softbatch.prompt_store.compression.data.passages import Passage
from softbatch.prompt_store.manifest import SoftPromptError
from softbatch.prompt_store.stores.kept_text import KeptText
from softbatch.prompt_store.stores.store import SoftPromptStore, StoredPrompt, UnknownPrompt
from softbatch.server.request_failures import InvalidPrompt, UnknownSoftPrompt, UnusableSoftPrompt
from softbatch.server.requests.prompt_encoder import PromptEncoder
from softbatch.server.requests.recall import PassageIndexes, Recalled, Recaller, _with_passages
from softbatch.server.requests.text import ChatPrompt, TextProcessor
from tests.support.tokenizers_of_bytes import as_transformers, byte_fallback

TEXT = "# Harbour\n\nThe {} office opens at seven. Ring the brass bell twice before you enter.\n"


@dataclass
class Texts:
    """The part of a store that is read here."""

    texts: dict[str, str]
    read: list[str] = field(default_factory=list)

    def kept_text(self, stored: StoredPrompt) -> KeptText | None:
        self.read.append(stored.name)
        text = self.texts.get(stored.name)
        return None if text is None else KeptText(text=text)


def stored(name: str) -> StoredPrompt:
    return StoredPrompt(name, Path(name), name * 8, 0, cast(Any, None), 0, (0,), 2)


def test_an_index_is_made_once_for_all_who_wait_and_goes_when_others_need_the_room() -> None:
    asyncio.run(_shared_and_bounded())


async def _shared_and_bounded() -> None:
    texts = Texts({name: TEXT.format(name) * 40 for name in "abc"})
    indexes = PassageIndexes(cast(SoftPromptStore, texts), max_bytes=60_000)
    found = await asyncio.gather(*(indexes.best(stored("a"), "When does the office open?", 1) for _ in range(8)))
    assert texts.read == ["a"]
    assert all(one is not None and "office" in one[0].text for one in found)
    for name in "bcbca":
        await indexes.best(stored(name), "office", 1)
    assert texts.read.count("a") == 2
    assert len(texts.read) < 7, "not every question makes one anew"


def test_a_damaged_text_is_an_error_of_the_soft_prompt() -> None:
    class Damaged(Texts):
        def kept_text(self, stored: StoredPrompt) -> KeptText | None:
            if stored.name == "gone":
                raise UnknownPrompt(stored.name)
            raise SoftPromptError("the object texts/a is damaged", param="file", code="invalid_file")

    indexes = PassageIndexes(cast(SoftPromptStore, Damaged({})))
    with pytest.raises(UnusableSoftPrompt, match=r"'a'.*texts/a is damaged.*recall: 0") as caught:
        asyncio.run(indexes.best(stored("a"), "office", 1))
    assert (caught.value.param, caught.value.code) == ("soft_prompt", "invalid_file")
    with pytest.raises(UnknownSoftPrompt):
        asyncio.run(indexes.best(stored("gone"), "office", 1))


def test_a_text_that_is_gone_is_looked_for_again() -> None:
    asyncio.run(_gone_and_back())


async def _gone_and_back() -> None:
    texts = Texts({})
    indexes = PassageIndexes(cast(SoftPromptStore, texts))
    assert await indexes.best(stored("a"), "office", 1) is None
    texts.texts["a"] = TEXT.format("a")
    assert await indexes.best(stored("a"), "office", 1)


def test_a_name_that_is_registered_anew_brings_its_new_text() -> None:
    """Of the same file, too: the soft prompt is the same, what it stands for was corrected."""
    asyncio.run(_corrected())


async def _corrected() -> None:
    texts = Texts({"a": TEXT.format("old")})
    indexes = PassageIndexes(cast(SoftPromptStore, texts))
    await indexes.best(stored("a"), "office", 1)
    texts.texts["a"] = TEXT.format("new")
    (found,) = await indexes.best(replace(stored("a"), version=(1,)), "office", 1) or []
    assert "new office" in found.text


def test_passages_begin_the_last_turn_of_the_user_in_every_form_of_a_conversation() -> None:
    turns = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
    ]
    found = [Passage("P", 0, 1)]
    expected = [*turns[:2], {"role": "user", "content": "P\n\nthree"}]
    assert _with_passages(turns, found) == expected
    chat = _with_passages(ChatPrompt(turns, {"tools": [1]}, ChatPrompt(turns[2:])), found)
    assert isinstance(chat, ChatPrompt)
    assert (chat.turns, chat.fields) == (expected, {"tools": [1]})
    assert chat.beside_system is not None
    assert chat.beside_system.turns == expected[2:]


def test_passages_with_tokens_that_the_model_lacks_reach_no_model() -> None:
    """Refused if they were asked for, and left out if not. Before token ids nothing else looks at them."""
    tokenizer = as_transformers(byte_fallback())
    text, extra = TextProcessor(tokenizer, 512), tokenizer.convert_tokens_to_ids("<extra>")
    lease = cast(Any, SimpleNamespace(stored=stored("a")))

    def find(rows: int, wanted: int | None) -> Recalled:
        indexes = PassageIndexes(cast(SoftPromptStore, Texts({"a": "The <extra> office opens at seven."})))
        recaller = Recaller(indexes, text, PromptEncoder(text, rows, 512, 10))
        return asyncio.run(recaller.find(text.encode("When does the office open?"), lease, wanted))

    assert find(extra + 1, 1).passages
    assert find(extra, None) == Recalled()
    with pytest.raises(InvalidPrompt, match=rf"no token {extra} \('<extra>'\)") as refused:
        find(extra, 1)
    assert (refused.value.param, refused.value.code) == ("recall", "token_id")
