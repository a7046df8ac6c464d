"""Reads a model: its files, what they say, and what it answers in float32, to compare with what is served."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from softbatch.prompt_store.fingerprint import fingerprint
from softbatch.prompt_store.manifest import ModelSpec
from softbatch.scheduler.model import transformers_attention as interface
from softbatch.scheduler.model.cuda.device_memory import is_shortage
from softbatch.scheduler.model.earlier_start import EarlierStart
from softbatch.scheduler.model.end_tokens import end_tokens
from softbatch.scheduler.model.family import Family
from softbatch.scheduler.model.gguf_weights import GgufWeights
from softbatch.scheduler.model.llama.decoder import supports
from softbatch.scheduler.model.model_error import ArchitectureError
from softbatch.scheduler.model.model_files import check_config, config_content, first_line, read_config
from softbatch.scheduler.model.native_weights import native_weights
from softbatch.scheduler.model.rotary import keep_long_frequencies
from softbatch.scheduler.model.self_check import LENGTH, Yardstick, has_short_windows, measure, short_windows
from softbatch.scheduler.model.source import ModelError, ModelSource
from softbatch.scheduler.model.weights import load_weights
from softbatch.scheduler.protocol import EngineConfig

if TYPE_CHECKING:
    from tokenizers import Tokenizer

logger = logging.getLogger(__name__)
Done = Callable[[str, str], None]


@dataclass(frozen=True, eq=False)
class ReadModel:
    """A model as its files have it. No sequence has more than `longest` tokens; `blocks` are what a GGUF file has for
    weights if they are served as they are."""

    model: Any
    spec: ModelSpec
    longest: int
    yardstick: Yardstick
    eos_token_ids: list[int]
    tokenizer: Callable[[], Tokenizer]
    blocks: GgufWeights | None = None

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())


def read_model(
    config: EngineConfig, source: ModelSource, dtype: torch.dtype, device: torch.device, done: Done
) -> ReadModel:
    """By transformers. Raises ModelError."""
    model, tokenizer = load_transformers(source, dtype, device, config.max_model_len)
    done("weights", _described(model))
    spec = spec_of(config.served_model_name or source.name, model, tokenizer)
    blocks = native_weights(config, source, model)
    longest = max(Family.of(model.config).length(config.max_model_len), LENGTH)
    yardstick = _measure(model, spec, tokenizer, longest)  # before weights are laid out anew and memory is taken
    done("yardstick", "a short sequence in float32")
    eos = end_tokens(model, tokenizer, config_content(source.path))
    return ReadModel(model, spec, longest, yardstick, eos, lambda: tokenizer.backend_tokenizer, blocks)


def read_again(config: EngineConfig, source: ModelSource, start: EarlierStart, done: Done) -> ReadModel | None:
    """As an earlier start has read it, without transformers; None where this one asks for something else. Raises
    ModelError."""
    model, note = start.model(), start.note
    family = Family.of(model.config)
    asked = family.length(config.max_model_len)
    family.refuse_unsupported(note.outline.kind, asked)
    longest = max(asked, LENGTH)
    if not supports(model, start.yardstick.dtype) or has_short_windows(family, longest) != note.has_short_windows:
        return None
    done("weights", _described(model))
    spec = _spec(config.served_model_name or source.name, model, note.fingerprint)
    done("yardstick", "of an earlier start")
    return ReadModel(model, spec, longest, start.yardstick, note.eos_token_ids, start.tokenizer)


def _described(model: Any) -> str:
    dtype = str(model.dtype).removeprefix("torch.")
    return f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters in {dtype}"


def load_transformers(
    source: ModelSource, dtype: torch.dtype, device: torch.device, max_model_len: int | None = None
) -> tuple[Any, Any]:
    """The frozen model, set to our attention, and its tokenizer. Raises ModelError."""
    interface.register()
    try:
        config = read_config(source.path)
        check_config(config, max_model_len)
    except ModelError as error:
        raise ModelError(f"--model {source.name}: {error}") from error
    tokenizer = source.tokenizer
    model = load_weights(source.name, source.path, dtype, config=config, attn_implementation="eager")
    _check_vocabulary(source.name, model, tokenizer)
    try:
        model = model.to(device).eval().requires_grad_(False)
    except RuntimeError as error:
        if not is_shortage(error):
            raise
        raise ModelError(f"--model {source.name}: its weights do not fit the GPU's free memory") from error
    model.set_attn_implementation(interface.ATTENTION_NAME)
    keep_long_frequencies(model)
    return model, tokenizer


def _check_vocabulary(name: str, model: Any, tokenizer: Any) -> None:
    """Requests with a token beyond the embedding are refused one by one; a model that begins or ends each of them so is
    refused here. Raises ModelError."""
    rows = model.get_input_embeddings().weight.shape[0]
    for field in ("bos_token", "eos_token"):
        token = getattr(tokenizer, f"{field}_id")
        if token is not None and token >= rows:
            raise ModelError(
                f"--model {name}: the tokenizer's {field} {getattr(tokenizer, field)!r} is token {token}, but the "
                f"embedding has {rows} rows"
            )
    if len(tokenizer) > rows:
        logger.warning(
            "the tokenizer has %d tokens, the embedding %d rows: the last cannot be used", len(tokenizer), rows
        )


def spec_of(name: str, model: Any, tokenizer: Any) -> ModelSpec:
    """What a soft prompt must fit to be used with this model."""
    return _spec(name, model, fingerprint(model, tokenizer))


def _spec(name: str, model: Any, its_fingerprint: str) -> ModelSpec:
    family = Family.of(model.config)
    return ModelSpec(
        name=name,
        fingerprint=its_fingerprint,
        hidden_size=model.get_input_embeddings().weight.shape[1],
        num_layers=family.num_layers,
        num_kv_heads=family.num_kv_heads,
        head_dim=family.head_dim,
    )


def _measure(model: Any, spec: ModelSpec, tokenizer: Any, longest: int) -> Yardstick:
    """Raises ModelError for an architecture that does not pass through paged attention."""
    with told_as_architecture(spec.name), short_windows(model, longest):
        return measure(model, spec, tokenizer)


@contextmanager
def told_as_architecture(name: str, is_optional: bool = False) -> Iterator[None]:
    """Raises ModelError for what model code and kernels raise where they cannot run a model."""
    try:
        yield
    except (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        if is_shortage(error):
            raise
        logger.debug("the self-check failed", exc_info=True)
        blamed = "" if is_optional else "this architecture cannot be served: "
        raise ArchitectureError(f"--model {name}: {blamed}{first_line(error)}") from error
