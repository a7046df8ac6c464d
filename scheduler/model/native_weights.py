"""--quantization native: whether a model can be served with the weights of its GGUF file as they are."""

from __future__ import annotations

from typing import Any

from softbatch.scheduler.model.cpu.build import build as build_kernels
from softbatch.scheduler.model.gguf_weights import GgufWeights, read_blocks
from softbatch.scheduler.model.llama.decoder import products, supports, unsupported_option_error
from softbatch.scheduler.model.model_error import ModelError
from softbatch.scheduler.model.source import ModelSource
from softbatch.scheduler.protocol import EngineConfig

NATIVE = "native"
_OPTION, _INSTEAD = f"--quantization {NATIVE}", "--quantization none"


def refuse_native(config: EngineConfig, source: ModelSource) -> None:
    """Before gigabytes of weights are loaded. Raises ModelError where nothing can be served as it is."""
    if config.quantization != NATIVE:
        return
    if source.gguf is None:
        raise ModelError(f"{_OPTION} takes a GGUF file, which --model {config.model} is not: use {_INSTEAD}")


def native_weights(config: EngineConfig, source: ModelSource, model: Any) -> GgufWeights | None:
    """The file's own weights if they are asked for. In float32, the model then has their exact values.

    Raises ModelError where the kernels cannot compute with them."""
    if config.quantization != NATIVE or source.gguf is None:
        return None
    if not (supports(model, model.dtype) and build_kernels()):
        raise unsupported_option_error(_OPTION, model, _INSTEAD)
    try:
        return read_blocks(source.gguf, model, products(model))
    except ModelError as error:
        raise ModelError(f"--model {source.name}: {_OPTION}: {error}: use {_INSTEAD}") from error
