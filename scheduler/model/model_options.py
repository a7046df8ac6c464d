"""Options that not every model or device takes, refused before gigabytes of weights are read."""

from __future__ import annotations

from typing import Any

import torch

from softbatch.scheduler.model.llama.decoder import may_support, unsupported_family_error
from softbatch.scheduler.model.model_error import ModelError
from softbatch.scheduler.model.model_files import causal_class, read_config
from softbatch.scheduler.model.native_weights import NATIVE, instead_of_native
from softbatch.scheduler.model.source import ModelSource
from softbatch.scheduler.protocol import EngineConfig

# Values of --quantization with which weights are those of the model's file.
NOT_CHANGED = frozenset({"none", NATIVE})


def rounding(config: EngineConfig) -> list[tuple[str, str]]:
    """Options that round more than the dtype does: as they were given, and as they would not."""
    found = []
    for name, value, plain in (
        ("--quantization", "none" if config.quantization in NOT_CHANGED else config.quantization, "none"),
        ("--kv-cache-dtype", config.kv_cache_dtype, "auto"),
    ):
        if value != plain:
            found.append((f"{name} {value}", f"{name} {plain}"))
    return found


def refuse_on_gpu(config: EngineConfig, device: torch.device) -> None:
    """Raises ModelError."""
    given = [(f"--quantization {NATIVE}", "--quantization none")] if config.quantization == NATIVE else []
    for option, plain in [*given, *rounding(config)] if device.type != "cpu" else ():
        raise ModelError(f"{option} takes a CPU: use --device cpu, or {plain}")
    if config.deterministic and device.type != "cpu":
        raise ModelError("--deterministic takes a CPU: use --device cpu, or leave it out")


def refuse_without_decoder(config: EngineConfig, source: ModelSource, dtype: torch.dtype, device: torch.device) -> None:
    """By the config of the model's directory. Raises ModelError as `refuse_family` does, also for native weights."""
    found = read_config(source.path)
    refuse_family(config, found, dtype, device)
    if config.quantization == NATIVE and source.gguf is not None:
        _refuse([(f"--quantization {NATIVE}", instead_of_native(found))], found, dtype, device)


def refuse_family(config: EngineConfig, found: Any, dtype: torch.dtype, device: torch.device) -> None:
    """By a config of transformers: what only the decoder in C++ can do, of a family that it does not know. Raises
    ModelError."""
    given = rounding(config)
    if config.deterministic:
        given.append(("--deterministic", "another model, or leave it out"))
    _refuse(given, found, dtype, device)


def _refuse(given: list[tuple[str, str]], found: Any, dtype: torch.dtype, device: torch.device) -> None:
    if device.type != "cpu" or not given:
        return
    family = causal_class(found)
    if not may_support(family, dtype):
        option, instead = given[0]
        raise unsupported_family_error(option, family, dtype, instead)
