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
CONFIGS = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
_POINTER = b"version https://git-lfs"
_MAX_POINTER_BYTES = 1024
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
    names = sorted(entry.name for entry in path.iterdir())
    for name in names:
        refuse_pointer(path / name)
    ggufs = [name for name in names if name.lower().endswith(".gguf")]
    if ggufs and not any(name.endswith((".safetensors", ".safetensors.index.json", ".bin")) for name in names):
        raise ModelError(
            f"--model {path}: its weights are a GGUF file: give the file itself, --model {path / ggufs[0]}"
        )
    if not (path / "config.json").is_file():
        adapter = "it holds an adapter (adapter_config.json), not a model" if has_adapter else "it has no config.json"
        raise ModelError(f"--model {path}: {adapter}; give the directory of a whole model")
    if has_adapter:
        raise ModelError(
            f"--model {path}: an adapter lies beside the model (adapter_config.json); merge it into the weights, or "
            "move its files elsewhere"
        )
    for name in CONFIGS:
        if (path / name).is_file():
            _parse(path / name)


def refuse_pointer(file: Path) -> None:
    """Raises ModelError for what Git leaves in a file's place where Git LFS is not installed."""
    try:
        is_small = file.is_file() and file.stat().st_size <= _MAX_POINTER_BYTES
        content = file.read_bytes() if is_small else b""
    except OSError:  # whoever needs the file says so
        return
    if content.startswith(_POINTER):
        raise ModelError(f"{file}: it only says where Git LFS keeps the file; fetch that with `git lfs pull`")


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
        _check_experts(content)
        _check_token_ids(file.with_name("generation_config.json"))
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


def causal_class(config: Any) -> str:
    """The name of the class that computes a causal language model, or that of the config where there is none."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    return str(getattr(MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None), "__name__", type(config).__name__))


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


def _check_experts(content: dict[str, Any]) -> None:
    """0 of 0 is a model without any. Raises ModelError."""
    name = next((name for name in ("num_local_experts", "num_experts") if content.get(name)), "")
    experts, chosen = content.get(name), content.get("num_experts_per_tok")
    if isinstance(experts, int) and isinstance(chosen, int) and not 1 <= chosen <= experts:
        raise ModelError(f"config.json: num_experts_per_tok is {chosen}, but must be from 1 to {name}, {experts}")


def _check_token_ids(file: Path) -> None:
    """Of a generation config, of which transformers believes anything. Raises ModelError."""
    content = _parse(file) if file.is_file() else {}
    for field in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = content.get(field)
        for one in value if isinstance(value, list) else [value]:
            if one is not None and (isinstance(one, bool) or not isinstance(one, int)):
                raise ModelError(f"{file.name}: {field} is {value!r}, but must be a token id, or a list of them")


def load_tokenizer(path: str) -> Any:
    """The fast tokenizer of a directory or a hub id. Raises ModelError."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # of many kinds, the tokenizers library's own among them
        raise ModelError(f"{_tokenizer_file(path)}: {reason(error, 'tokenizer')}") from error
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise ModelError("its tokenizer has no fast version (tokenizer.json)")
    longest = tokenizer.model_max_length
    if isinstance(longest, bool) or not isinstance(longest, int | float):
        raise ModelError(f"tokenizer_config.json: model_max_length is {longest!r}, but must be a number")
    _check_template(tokenizer)
    return tokenizer


def _check_template(tokenizer: Any) -> None:
    """What a template says against this chat, it may not say against another. Raises ModelError."""
    from jinja2 import TemplateSyntaxError

    template = tokenizer.chat_template
    if template is not None and not isinstance(template, str | dict):
        raise ModelError(f"tokenizer_config.json: chat_template is {template!r}, but must be a Jinja template")
    try:
        if template:
            tokenizer.apply_chat_template([{"role": "user", "content": "?"}], tokenize=False)
    except TemplateSyntaxError as error:
        raise ModelError(
            f"its chat template cannot be read: line {error.lineno}: {error.message}; mend it, or give another with "
            "--chat-template FILE"
        ) from error
    except Exception as error:  # whatever a template does
        logger.debug("the chat template: %s", error)


def _tokenizer_file(path: str) -> str:
    """The file at fault, as far as that can be told."""
    file = Path(path) / "tokenizer.json"
    if not file.is_file():
        return (
            "it has no tokenizer.json, and none can be made of its other files" if file.parent.is_dir() else "tokenizer"
        )
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
        return str(error.args[0]) if error.args and " " in str(error.args[0]) else f"{error} is missing"
    if lines and lines[0].startswith("Class validation error") and len(lines) > 1:
        return lines[1].split("Error: ", 1)[-1]
    if isinstance(error, TypeError | AttributeError | ZeroDivisionError):
        return f"transformers cannot read it: {type(error).__name__}: {lines[0] if lines else ''}"
    return lines[0] if lines else type(error).__name__
