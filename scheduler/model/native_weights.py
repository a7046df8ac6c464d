"""--quantization native: whether a model can be served with the weights of its GGUF file as they are."""

from __future__ import annotations

from typing import Any

import torch

from softbatch.scheduler.model.cpu.build import build as build_kernels
from softbatch.scheduler.model.gguf_weights import GgufWeights, read_blocks, refuse_other_kinds
from softbatch.scheduler.model.llama.decoder import (
    may_support,
    products,
    supports,
    unsupported_family_error,
    unsupported_option_error,
)
from softbatch.scheduler.model.model_error import ModelError
from softbatch.scheduler.model.model_files import causal_class, read_config
from softbatch.scheduler.model.mxfp4 import is_in_blocks
from softbatch.scheduler.model.source import ModelSource, gguf_of
from softbatch.scheduler.protocol import EngineConfig

NATIVE = "native"
_OPTION, _INSTEAD = f"--quantization {NATIVE}", "--quantization none"


def refuse_native(config: EngineConfig, source: ModelSource) -> None:
    """Before gigabytes of weights are loaded. Raises ModelError where nothing can be served as it is."""
    if config.quantization != NATIVE:
        return
    if source.gguf is None and not _has_mxfp4(source):
        raise ModelError(
            f"{_OPTION} takes a GGUF file, or a directory of gpt-oss in MXFP4, which --model {config.model} is not: "
            f"use {_INSTEAD}"
        )


def _has_mxfp4(source: ModelSource) -> bool:
    """Experts that are served in their blocks with any value of the option. Raises ModelError."""
    return is_in_blocks(read_config(source.path))


def instead_of_native(found: Any) -> str:
    """`found` is a config of transformers."""
    return f"{_INSTEAD}{', which keeps experts in MXFP4 as they are' if is_in_blocks(found) else ''}"


def refuse_native_file(config: EngineConfig, found: Any, dtype: torch.dtype) -> None:
    """Before the file is converted, which takes minutes; `found` is its config for transformers. Raises ModelError."""
    file = gguf_of(config.model) if config.quantization == NATIVE else None
    if file is None:
        return
    family = causal_class(found)
    if not may_support(family, dtype):
        raise unsupported_family_error(_OPTION, family, dtype, instead_of_native(found))
    try:
        refuse_other_kinds(file)
    except ModelError as error:
        raise ModelError(f"{_OPTION}: {error}: use {_INSTEAD}") from error


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
