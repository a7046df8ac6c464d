"""End tokens come from every place that names them, and the first is the one that ends a turn."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from softbatch.prompt_store.template import turn_end
from softbatch.scheduler.model.end_tokens import end_tokens

TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
VOCAB = {"a": 0, "<eos>": 1, "<|end|>": 2, "<|user|>": 3, "<|assistant|>": 4, "x": 5}


def make_tokenizer(template: str | None = TEMPLATE) -> Any:
    backend = Tokenizer(models.WordLevel(VOCAB, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", unk_token="a")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>", "<|user|>", "<|assistant|>"]})
    tokenizer.chat_template = template
    return tokenizer


def make_model(generation: Any, config: Any = None) -> Any:
    embedding = torch.nn.Embedding(6, 2)
    return SimpleNamespace(
        get_input_embeddings=lambda: embedding,
        generation_config=SimpleNamespace(eos_token_id=generation),
        config=SimpleNamespace(eos_token_id=config),
    )


@pytest.mark.parametrize(
    ("template", "generation", "config", "expected"),
    [
        (TEMPLATE, [1, 0], None, [2, 1, 0]),
        (TEMPLATE, 0, 5, [2, 1, 0, 5]),
        (TEMPLATE, None, None, [2, 1]),
        (None, [5, 1], None, [1, 5]),
        (TEMPLATE, [-1, 6], None, [2, 1]),
        ("{% for m in messages %}{{ m.content }} x{% endfor %}", 0, None, [1, 0]),
    ],
)
def test_all_sources_are_joined(template: str | None, generation: Any, config: Any, expected: list[int]) -> None:
    said = {"eos_token_id": config}
    assert end_tokens(make_model(generation, config), make_tokenizer(template), said) == expected


@pytest.mark.parametrize(
    ("generation", "is_derived", "expected"),
    [(0, False, [2, 1, 0]), (5, False, [2, 1, 5]), (5, True, [2, 1]), (None, False, [2, 1])],
)
def test_the_default_of_a_configs_class_ends_nothing(generation: Any, is_derived: bool, expected: list[int]) -> None:
    """config.json does not name it; a generation config without a file of its own has it too."""
    model = make_model(generation, 5)
    model.generation_config._from_model_config = is_derived
    assert end_tokens(model, make_tokenizer(), {}) == expected


def test_the_default_of_a_configs_class_where_nothing_else_is_named() -> None:
    tokenizer = make_tokenizer(None)
    tokenizer.eos_token = None
    assert end_tokens(make_model(None, 5), tokenizer, {}) == [5]


def test_a_template_that_refuses_ends_nothing() -> None:
    assert turn_end(make_tokenizer("{{ raise_exception('no') }}")) is None


def test_a_template_that_drops_the_answer_ends_nothing() -> None:
    assert turn_end(make_tokenizer("<|user|> {{ messages[0].content }} <|end|>")) is None
