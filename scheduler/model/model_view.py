"""A model's directory with some of its texts changed: links to all else, in the cache, made once."""

from __future__ import annotations

import codecs
import hashlib
import logging
from collections.abc import Collection, Mapping
from pathlib import Path

from softbatch.prompt_store.atomic_files import process_directory
from softbatch.scheduler.model.model_error import ModelError
from softbatch.scheduler.model.model_files import CONFIGS

logger = logging.getLogger(__name__)
CHAT_TEMPLATE = "chat_template.jinja"
_MORE_TEMPLATES = "additional_chat_templates"
MAX_TEMPLATE_BYTES = 1 << 20
# What transformers reads beside the weights; a mark in any other text, a licence say, disturbs nobody.
_TEXTS = frozenset(
    {
        *CONFIGS,
        CHAT_TEMPLATE,
        "chat_template.json",
        "vocab.json",
        "vocab.txt",
        "merges.txt",
        "model.safetensors.index.json",
        "pytorch_model.bin.index.json",
    }
)


def without_marks(path: Path, cache: Path) -> Path:
    """The directory itself, or, where a config or a tokenizer's file begins with a byte order mark that readers stumble
    over, a view without the marks. Raises ModelError."""
    marked = [entry for entry in _entries(path) if entry.name in _TEXTS and _has_mark(entry)]
    return _view(path, cache, {entry.name: entry.read_bytes().removeprefix(codecs.BOM_UTF8) for entry in marked})


def with_chat_template(path: Path, cache: Path, template: Path) -> Path:
    """A view whose only chat template is that file, whatever the model brings. Raises ModelError."""
    return _view(path, cache, {CHAT_TEMPLATE: _read_template(template).encode()}, without={_MORE_TEMPLATES})


def _read_template(file: Path) -> str:
    from jinja2 import TemplateSyntaxError
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        if file.stat().st_size > MAX_TEMPLATE_BYTES:
            raise ModelError(f"--chat-template {file}: larger than {MAX_TEMPLATE_BYTES >> 20} MiB")
        text = file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ModelError(f"--chat-template {file}: {error.strerror}; give a file with a Jinja template") from error
    except UnicodeDecodeError as error:
        raise ModelError(f"--chat-template {file}: not UTF-8 text") from error
    if "messages" not in text:
        raise ModelError(f"--chat-template {file}: it never reads `messages`, so no chat would be in what it writes")
    try:
        render_jinja_template([[{"role": "user", "content": "?"}]], chat_template=text)
    except TemplateSyntaxError as error:
        raise ModelError(f"--chat-template {file}: line {error.lineno}: {error.message}") from error
    except Exception as error:  # what a template says against this chat, it may not say against another
        logger.debug("--chat-template %s: %s", file, error)
    return text


def _view(path: Path, cache: Path, texts: Mapping[str, bytes], without: Collection[str] = ()) -> Path:
    """The directory itself where no text changes."""
    entries = [entry for entry in _entries(path) if entry.name not in without]
    if not texts:
        return path
    seen = [(str(entry), entry.stat().st_size, entry.stat().st_mtime_ns) for entry in entries]
    changed = sorted((name, hashlib.sha256(text).hexdigest()) for name, text in texts.items())
    target = cache / f"{path.name}-{hashlib.sha256(repr((seen, changed)).encode()).hexdigest()[:16]}"
    if target.is_dir():
        return target
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with process_directory(cache, ".view-") as aside:
            for entry in entries:
                if entry.name not in texts:
                    (aside / entry.name).symlink_to(entry)
            for name, text in texts.items():
                (aside / name).write_bytes(text)
            aside.rename(target)
    except OSError as error:
        if not target.is_dir():  # otherwise another process was quicker
            raise ModelError(f"cannot write to {cache}: {error.strerror}") from error
    return target


def _entries(path: Path) -> list[Path]:
    return sorted(entry for entry in path.iterdir() if entry.exists())


def _has_mark(file: Path) -> bool:
    try:
        with file.open("rb") as opened:
            return opened.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8
    except OSError:  # whoever needs the file says so
        return False
