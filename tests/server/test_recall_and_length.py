"""What a prompt with passages before its question keeps of itself where it is cut, and where passages do not fit."""

from __future__ import annotations

import asyncio
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, cast

import pytest
from tokenizers.processors import TemplateProcessing

from softbatch.prompt_store.compression.data.passages import Passage
from softbatch.server.request_failures import PromptTooLong
from softbatch.server.requests.prompt_encoder import Prompt, PromptEncoder
from softbatch.server.requests.recall import Recalled, Recaller
from softbatch.server.requests.scoring import Scorer
from softbatch.server.requests.text import TextProcessor
from tests.support.soft_prompt_samples import byte_tokenizer

TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
FOUND = Recalled((Passage("P" * 20, 0, 20),), 22)
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
WHOLE = f"[system]Be brief.[user]{'P' * 20}\n\nWhy?"


class Finding(Recaller):
    """Finds the same for all."""

    async def find(self, prompt: Prompt, lease: object, wanted: int | None) -> Recalled:
        return FOUND


@pytest.fixture(scope="module")
def text() -> TextProcessor:
    tokenizer = byte_tokenizer(TEMPLATE)
    beginning = tokenizer.backend_tokenizer.token_to_id("<s>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", beginning)]
    )
    return TextProcessor(tokenizer, 100)


@pytest.fixture(scope="module")
def recaller(text: TextProcessor) -> Finding:
    return Finding(cast(Any, None), text, PromptEncoder(text, 300, 100, 10))


def kept(text: TextProcessor, recaller: Recaller, prompt: Prompt, keep: int | None) -> str:
    token_ids = asyncio.run(recaller.token_ids(prompt, FOUND, None, keep=keep))
    return text.decode(token_ids, skip_special_tokens=False)


def test_a_chat_that_fits_without_its_passages_is_whole_with_them(text: TextProcessor, recaller: Recaller) -> None:
    alone = len(WHOLE) - FOUND.tokens
    assert kept(text, recaller, CHAT, None) == WHOLE
    assert kept(text, recaller, CHAT, alone) == WHOLE
    assert kept(text, recaller, CHAT, alone - 3) == WHOLE[3:]


def test_passages_stand_behind_what_every_text_begins_with(text: TextProcessor, recaller: Recaller) -> None:
    passages = "P" * 20 + "\n\n"
    assert kept(text, recaller, "Why not?", None) == f"<s>{passages}Why not?"
    assert kept(text, recaller, "Why not?", 50) == f"<s>{passages}Why not?"
    assert kept(text, recaller, "Why not?", 5) == f"<s>{passages}not?"
    assert kept(text, recaller, [40, 41, 42], None).startswith(passages)


def scoring(asked: list[list[int]]) -> Any:
    """An admission that notes what is asked for, and finds every token certain."""

    def prepare(token_ids: list[int], *_: object, score_from: int, **fields: object) -> Any:
        asked.append(token_ids[score_from:])
        return SimpleNamespace(token_ids=token_ids)

    @contextmanager
    def reserve(count: int) -> Any:
        async def lease(name: str | None) -> None: ...

        yield SimpleNamespace(lease=lease, prepare=prepare)

    async def run(requests: list[Any]) -> list[Any]:
        return [SimpleNamespace(scores=[SimpleNamespace(logprob=0.0)] * 3) for _ in requests]

    return SimpleNamespace(reserve=reserve, run=run, release=lambda lease: None)


def test_candidates_are_scored_without_passages_that_nobody_asked_for(text: TextProcessor, recaller: Recaller) -> None:
    encoder = PromptEncoder(text, 300, 30, 10)
    scorer = Scorer(scoring([]), encoder, Finding(cast(Any, None), text, encoder), ())

    def score(prompt: str, recall: int | None) -> Any:
        return asyncio.run(scorer.score(prompt, ["yes"], soft_prompt=None, recall=recall, end=False, route=""))

    assert score("Why", None).recalled == FOUND
    assert (score("Why not?", None).recalled, score("Why not?", None).prompt_tokens) == (Recalled(), 9)
    with pytest.raises(PromptTooLong):
        score("Why not?", 1)
    with pytest.raises(PromptTooLong):
        score("Why not? " * 9, None)


def test_a_whole_answer_ends_as_a_turn_does(text: TextProcessor, recaller: Recaller) -> None:
    """By the first end token, whichever is the lowest."""
    asked: list[list[int]] = []
    scorer = Scorer(scoring(asked), PromptEncoder(text, 300, 100, 10), recaller, (7, 0))
    for end in (True, False):
        asyncio.run(scorer.score("Why?", ["yes"], soft_prompt=None, recall=None, end=end, route=""))
    answer = text.encode("yes", add_special_tokens=False)
    assert asked == [[*answer, 7], answer]
