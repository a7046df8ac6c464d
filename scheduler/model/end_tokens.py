"""The tokens that end an answer, joined from every place that names them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from softbatch.prompt_store.template import turn_end


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """First the one that ends a turn: as the chat template has it, else the tokenizer's. Then those of the generation
    config and of the config; none beyond the vocabulary."""
    rows = model.get_input_embeddings().weight.shape[0]
    return [token for token in dict.fromkeys(_named(model, tokenizer)) if 0 <= token < rows]


def _named(model: Any, tokenizer: Any) -> Iterator[int]:
    sources = [turn_end(tokenizer), tokenizer.eos_token_id]
    sources += [getattr(config, "eos_token_id", None) for config in (model.generation_config, model.config)]
    for source in sources:
        if source is not None:
            yield from source if isinstance(source, list | tuple) else [source]
