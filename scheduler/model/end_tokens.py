"""The tokens that end an answer, joined from every place that names them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from softbatch.prompt_store.template import turn_end


def end_tokens(model: Any, tokenizer: Any, said: Mapping[str, Any]) -> list[int]:
    """First the one that ends a turn: as the chat template has it, else the tokenizer's. Then those of the generation
    config and of the config, whose file says `said`; none beyond the vocabulary."""
    rows = model.get_input_embeddings().weight.shape[0]
    return [token for token in dict.fromkeys(_named(model, tokenizer, said)) if 0 <= token < rows]


def _named(model: Any, tokenizer: Any, said: Mapping[str, Any]) -> Iterator[int]:
    sources = [turn_end(tokenizer), tokenizer.eos_token_id]
    of_config = getattr(model.config, "eos_token_id", None)
    of_generation = getattr(model.generation_config, "eos_token_id", None)
    is_default = "eos_token_id" not in said  # of the config's class: some other model's
    # Without a file of its own, transformers makes the generation config of the config; saved files may say so, too.
    is_derived = of_generation == of_config and getattr(model.generation_config, "_from_model_config", False)
    if not (is_default and is_derived):
        sources.append(of_generation)
    if not is_default or all(source is None for source in sources):
        sources.append(of_config)
    for source in sources:
        if source is not None:
            yield from source if isinstance(source, list | tuple) else [source]
