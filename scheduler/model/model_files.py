"""What stands beside a model's weights, read strictly: config and tokenizer. Code that a model brings is never run."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

from softbatch.scheduler.model.family import Family
from softbatch.scheduler.model.model_error import ModelError

logger = logging.getLogger(__name__)
_CONFIGS = ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json")
_SIZES = frozenset(
    {
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "n_embd",
        "n_layer",
        "n_head",
        "n_positions",
    }
)
_FIELD = re.compile(r"field '(\w+)'")


def first_line(error: BaseException) -> str:
    """What an exception says, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def check_directory(path: Path) -> None:
    """Raises ModelError for a directory that does not hold a model, or more than one."""
    has_adapter = (path / "adapter_config.json").is_file()
    if not (path / "config.json").is_file():
        adapter = "it holds an adapter (adapter_config.json), not a model" if has_adapter else "it has no config.json"
        raise ModelError(f"--model {path}: {adapter}; give the directory of a whole model")
    if has_adapter:
        raise ModelError(
            f"--model {path}: an adapter lies beside the model (adapter_config.json); merge it into the weights, or "
            "move its files elsewhere"
        )
    for name in _CONFIGS:
        if (path / name).is_file():
            _parse(path / name)


def _parse(file: Path) -> dict[str, Any]:
    try:
        parsed = json.loads(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ModelError(f"{file}: {error.strerror}") from error
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ModelError(f"{file}: not valid JSON: {first_line(error)}") from error
    if not isinstance(parsed, dict):
        raise ModelError(f"{file}: it holds {type(parsed).__name__}, but must hold an object")
    return parsed


def read_config(path: str) -> Any:
    """The transformers config of a directory or a hub id. Raises ModelError, which names the field at fault."""
    from transformers import CONFIG_MAPPING, AutoConfig

    file = Path(path) / "config.json"
    if file.is_file():
        content = _parse(file)
        kind = content.get("model_type")
        is_known = isinstance(kind, str) and kind in CONFIG_MAPPING
        if not is_known and "auto_map" in content:
            raise ModelError(
                f"config.json: the model brings its own code (auto_map), which is never run, and transformers knows no "
                f"model_type {kind!r}"
            )
        if not is_known:
            raise ModelError(f"config.json: model_type is {kind!r}, which transformers does not know")
        _check_sizes(content)
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # of many kinds: JSON, a field's type, what a config computes of its fields
        raise ModelError(f"config.json: {reason(error, 'config')}") from error


def config_content(path: str) -> dict[str, Any]:
    """What the config.json of a directory or a hub id, loaded before, says itself: no defaults. Raises ModelError."""
    from transformers.utils import cached_file

    file = Path(path) / "config.json"
    if file.is_file():
        return _parse(file)
    cached = cached_file(path, file.name, local_files_only=True, _raise_exceptions_for_missing_entries=False)
    return _parse(Path(cached)) if cached else {}


def check_config(config: Any, max_model_len: int | None) -> None:
    """Everything that can be said against a model before its weights are read. Raises ModelError."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if kind is None:
        raise ModelError(f"config.json: model_type {config.model_type!r} is no causal language model")
    kind = kind[0] if isinstance(kind, tuple) else kind
    if not getattr(kind, "_supports_attention_backend", False):
        raise ModelError(
            f"{kind.__name__} does not use transformers' attention interface; such models cannot be served"
        )
    family = Family.of(config)
    family.refuse_unsupported(kind.__name__, family.length(max_model_len))


def _check_sizes(content: dict[str, Any]) -> None:
    """Before a config divides one by the other. Raises ModelError."""
    for field in _SIZES & content.keys():
        value = content[field]
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ModelError(f"config.json: {field} is {value!r}, but must be a whole number of at least 1")


def load_tokenizer(path: str) -> Any:
    """The fast tokenizer of a directory or a hub id. Raises ModelError."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # of many kinds, the tokenizers library's own among them
        raise ModelError(f"{_tokenizer_file(path)}: {reason(error, 'tokenizer')}") from error
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise ModelError("its tokenizer has no fast version (tokenizer.json)")
    return tokenizer


def _tokenizer_file(path: str) -> str:
    """The file at fault, as far as that can be told."""
    file = Path(path) / "tokenizer.json"
    if not file.is_file():
        return "tokenizer"
    from tokenizers import Tokenizer

    try:
        Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exceptions
        return f"tokenizer.json is not a tokenizer ({first_line(error)})"
    return "tokenizer_config.json"


def reason(error: Exception, what: str) -> str:
    """What is wrong with the config or the tokenizer, in one line that names the field where there is one."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    if any("trust_remote_code" in line or "custom code" in line for line in lines):
        return f"the {what} takes code that the model brings (auto_map), which is never run"
    field = _FIELD.search(lines[0]) if lines else None
    if field is not None:
        return f"{field[1]}: {lines[-1].removeprefix('TypeError: ').removeprefix('ValueError: ')}"
    if isinstance(error, KeyError):
        return f"{error} is missing"
    if isinstance(error, TypeError | AttributeError | ZeroDivisionError):
        return f"transformers cannot read it: {type(error).__name__}: {lines[0] if lines else ''}"
    return lines[0] if lines else type(error).__name__
