"""Many inputs of one request to embed, none of them long, are tokenised beside the event loop."""

from __future__ import annotations

import asyncio
import threading
from typing import Any, cast

import pytest

from softbatch.scheduler.protocol import Pooling
from softbatch.server.request_failures import InvalidPrompt
from softbatch.server.requests.embedding import Embedder, EmbeddingOrder
from softbatch.server.requests.prompt_encoder import LONG_TEXT, PromptEncoder
from softbatch.server.requests.text import TextProcessor
from tests.support.tokenizers_of_bytes import as_transformers, byte_level


class Watched(TextProcessor):
    """Knows which threads have tokenised."""

    def encode(self, *args: Any, **kwargs: Any) -> list[int]:
        self.threads = {*getattr(self, "threads", ()), threading.get_ident()}
        return super().encode(*args, **kwargs)


def test_inputs_that_are_long_together_leave_the_event_loop_alone() -> None:
    text = Watched(as_transformers(byte_level()), 2 * LONG_TEXT)
    embedder = Embedder(cast(Any, None), PromptEncoder(text, text.backend.get_vocab_size(), 2 * LONG_TEXT, 1), 4)

    def token_ids(*inputs: str) -> list[list[int]]:
        text.threads = set()
        order = EmbeddingOrder(inputs, cast(Pooling, None))
        return asyncio.run(embedder._all_token_ids(order, None))

    assert len(token_ids("ab", "c")) == 2
    assert text.threads == {threading.get_ident()}
    many = token_ids(*["ab" * 1000] * 9)
    assert len(many) == 9
    assert text.threads.isdisjoint({threading.get_ident()})
    with pytest.raises(InvalidPrompt) as refused:
        token_ids(*["ab" * 1000] * 9, "")
    assert refused.value.param == "input.9"
