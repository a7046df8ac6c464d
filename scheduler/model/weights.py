"""Weights loaded strictly: all that the config asks for, nothing else, in the right shapes."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from softbatch.scheduler.model.model_error import ModelError
from softbatch.scheduler.model.model_files import first_line

logger = logging.getLogger(__name__)
# Wrappers that leave their name in front of every weight they are saved with.
_WRAPPERS = {"_orig_mod.": "torch.compile", "module.": "DataParallel", "base_model.model.": "an adapter's wrapper"}
_LAYER = re.compile(r"\.(\d+)\.")


def load_weights(name: str, path: str, dtype: torch.dtype, **options: Any) -> Any:
    """The model with exactly the weights that its config names. Raises ModelError with the first that is not so."""
    from transformers import AutoModelForCausalLM  # what was outlined at an earlier start is read without
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # the phases say how far the start has come
    try:
        with _quiet():
            model, loading = AutoModelForCausalLM.from_pretrained(
                path,
                dtype=dtype,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,  # told below, with both shapes
                output_loading_info=True,
                **options,
            )
    except Exception as error:  # of many kinds: a reader's, torch's, transformers' own
        logger.debug("loading failed", exc_info=True)
        raise ModelError(f"--model {name}: {_why_not_loaded(error, options.get('config'))}") from error
    try:
        refuse_other_weights(model, loading)
    except ModelError as error:
        raise ModelError(f"--model {name}: {error}") from None
    return model


def _why_not_loaded(error: Exception, config: Any) -> str:
    """In one line. Of a word that transformers has nothing for, such as an activation, the field of the config."""
    if isinstance(error, KeyError) and config is not None:
        word = error.args[0] if error.args else None
        field = _field_of(word, config.get_text_config().to_dict())
        if field is not None:
            return f"config.json: {field} is {word!r}, which transformers does not know"
        return f"transformers cannot load it: it lacks {word!r}"
    if isinstance(error, AssertionError) and "padding_idx" in str(error).lower() and config is not None:
        # Some add a token to fill up with and leave the embedding as it is; only some models look its row up.
        text = config.get_text_config()
        return f"config.json: pad_token_id is {text.pad_token_id}, but vocab_size is {text.vocab_size}; -1 is none"
    if type(error).__name__ == "UnpicklingError":
        return "its weights are a pickle of more than tensors, which is never run; save them as safetensors"
    return f"transformers cannot load it: {first_line(error)}"


def _field_of(word: object, content: Mapping[str, Any]) -> str | None:
    for name, value in content.items():
        if isinstance(value, str) and value == word:
            return name
        if isinstance(value, Mapping) and (inner := _field_of(word, value)) is not None:
            return f"{name}.{inner}"
    return None


def refuse_other_weights(model: Any, loading: dict[str, Any]) -> None:
    """Raises ModelError where the file's weights are not the model's."""
    missing = set(loading["missing_keys"])
    buffers = {buffer for buffer, _ in model.named_buffers()}
    unexpected = {key for key in loading["unexpected_keys"] if not _is_buffer(key, buffers)}
    if missing:
        raise ModelError(f"the file lacks {_some(missing)}{_why_missing(model, missing, unexpected)}")
    if loading["mismatched_keys"]:
        key, found, wanted = min(loading["mismatched_keys"], key=lambda each: _order(each[0]))
        others = len(loading["mismatched_keys"]) - 1
        raise ModelError(
            f"{key} is {_shape(found)} in the file and {_shape(wanted)} by config.json"
            f"{f' ({others} more differ)' if others else ''}"
        )
    if unexpected:
        raise ModelError(f"the file has {_some(unexpected)}, which the model that config.json describes has not")
    _refuse_another_head(model)


def _refuse_another_head(model: Any) -> None:
    """transformers keeps a head that the config ties to the embedding if the file has another one."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or not model.config.get_text_config().tie_word_embeddings:
        return
    if head.weight is not embedding.weight and not torch.equal(head.weight, embedding.weight):
        raise ModelError(
            "config.json ties the output head to the embedding (tie_word_embeddings), but the file has a head of its "
            "own: set tie_word_embeddings to false if that is right"
        )


def _why_missing(model: Any, missing: Collection[str], unexpected: Collection[str]) -> str:
    """The likely reason, as the end of a sentence."""
    for key in sorted(missing, key=_order):
        for other in unexpected:
            prefix = other.removesuffix(key)
            if prefix and prefix != other:
                wrapper = next((f", as {by} leaves it" for start, by in _WRAPPERS.items() if start in prefix), "")
                return f"; its names begin with {prefix!r}{wrapper}: rename them"
    if any("lm_head" in key for key in missing):
        return ", and config.json does not tie the head to the embedding (tie_word_embeddings)"
    if unexpected:
        return f", and has {_some(unexpected)} instead"
    return ", which config.json describes (num_hidden_layers?)" if _last_layers(model, missing) else ""


def _last_layers(model: Any, missing: Collection[str]) -> bool:
    """Whether whole layers at the end are missing."""
    layers = model.config.get_text_config().num_hidden_layers
    found = {int(match[1]) for key in missing if (match := _LAYER.search(key))}
    return bool(found) and found == set(range(min(found), layers))


def _is_buffer(key: str, buffers: Collection[str]) -> bool:
    """What older files have beside the weights: masks and frequencies that a model makes itself."""
    if key.endswith((".rotary_emb.inv_freq", ".attn.masked_bias", ".attention.masked_bias")):
        return True
    return any(buffer == key or buffer.endswith(f".{key}") or key.endswith(f".{buffer}") for buffer in buffers)


def _some(keys: Collection[str]) -> str:
    first = min(keys, key=_order)
    return f"{first} and {len(keys) - 1} more" if len(keys) > 1 else first


def _order(key: str) -> tuple[tuple[int, str], ...]:
    """Names as people order them: layer 2 before layer 10."""
    return tuple((int(part), "") if part.isdigit() else (-1, part) for part in key.split("."))


def _shape(size: Any) -> str:
    return f"[{', '.join(str(each) for each in size)}]"


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers warns of what is told here in one line, in tables of many."""
    library = logging.getLogger("transformers")
    before = library.level
    library.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        library.setLevel(before)
