"""What the checks of a start are run over."""

from __future__ import annotations

from softbatch.scheduler.model.self_check import LENGTH, TEXT, check_tokens
from softbatch.scheduler.model.source import EMBEDDED_ALIAS, resolve


def test_a_text_as_the_models_own_tokenizer_has_it() -> None:
    tokenizer = resolve(EMBEDDED_ALIAS).tokenizer
    assert TEXT.startswith(tokenizer.decode(check_tokens(tokenizer, len(tokenizer)), skip_special_tokens=True))


def test_an_embedding_that_has_few_tokens_of_the_text() -> None:
    found = check_tokens(resolve(EMBEDDED_ALIAS).tokenizer, 100)
    assert len(set(found)) == LENGTH
    assert max(found) < 100
