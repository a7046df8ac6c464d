"""The texts that soft prompts were made of, kept beside them for recall: private to the store, never listed or sent.

`.texts/<name>.<sha256>.json` in the store's directory, readable by its owner alone, holds
`{"format_version": 1, "recall": 2, "text": "…"}`. The hash is that of the soft prompt's file, so that no soft prompt
that has the name later is ever read with it.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from softbatch.prompt_store.atomic_files import replacing, sync
from softbatch.prompt_store.manifest import SoftPromptError

FORMAT_VERSION = 1
MAX_KEPT_BYTES = 1 << 20
MAX_RECALL = 16  # passages of one request
DEFAULT_RECALL = 2
DIRECTORY = ".texts"
_STALE_SECONDS = 3600


class KeptText(msgspec.Struct, frozen=True, kw_only=True):
    """`recall` is how many passages a request gets that does not say; 0: none."""

    text: str
    recall: int = DEFAULT_RECALL
    format_version: int = FORMAT_VERSION


def check_kept(kept: KeptText) -> None:
    """Raises SoftPromptError."""
    if not kept.text.strip():
        raise SoftPromptError("the text to keep is empty", param="text", code="invalid_text")
    if (size := len(kept.text.encode())) > MAX_KEPT_BYTES:
        raise SoftPromptError(
            f"the text to keep has {size} bytes; at most {MAX_KEPT_BYTES} are allowed", param="text", code="too_large"
        )
    if not 0 <= kept.recall <= MAX_RECALL:
        raise SoftPromptError(
            f"recall must lie between 0 and {MAX_RECALL} passages, got {kept.recall}",
            param="recall",
            code="out_of_range",
        )


def write_kept(kept: KeptText, path: Path) -> None:
    """Whole or not at all, for its owner alone."""
    with replacing(path) as temporary:
        with open(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as file:
            file.write(msgspec.json.encode(kept))
        sync(temporary)


def read_kept(path: Path) -> KeptText | None:
    """None where there is nothing of use."""
    try:
        kept = msgspec.json.decode(path.read_bytes(), type=KeptText)
        check_kept(kept)
    except (OSError, msgspec.MsgspecError, UnicodeError, SoftPromptError):
        return None
    return kept if kept.format_version == FORMAT_VERSION else None


@dataclass(frozen=True)
class KeptTexts:
    """Owns the directory of kept texts of one store, which is made with the first of them.

    A text is there before its soft prompt and goes before it: what a crash leaves is a soft prompt without a text, or a
    text that nothing points to.
    """

    directory: Path

    def add(self, name: str, sha256: str, kept: KeptText) -> bool:
        """False where this very soft prompt has one already, which stays."""
        check_kept(kept)
        self.directory.mkdir(mode=0o700, exist_ok=True)
        path = self._path(name, sha256)
        if path.exists():
            return False
        write_kept(kept, path)
        sync(self.directory)
        return True

    def read(self, name: str, sha256: str) -> KeptText | None:
        return read_kept(self._path(name, sha256))

    def remove(self, name: str, sha256: str | None = None) -> None:
        """All that the name has, or that of one soft prompt."""
        found = [self._path(name, sha256)] if sha256 else [p for p in self._files() if _name_of(p) == name]
        for path in found:
            path.unlink(missing_ok=True)
        if found and self.directory.exists():
            sync(self.directory)

    def remove_stale(self, is_registered: Callable[[str], bool]) -> None:
        """What crashes have left, once no other process can be at work on it."""
        for path in self._files():
            with contextlib.suppress(OSError):
                if not is_registered(_name_of(path)) and time.time() - path.stat().st_mtime > _STALE_SECONDS:
                    path.unlink()

    def _files(self) -> list[Path]:
        return list(self.directory.iterdir()) if self.directory.is_dir() else []

    def _path(self, name: str, sha256: str) -> Path:
        return self.directory / f"{name}.{sha256}.json"


def _name_of(path: Path) -> str:
    """Names hold dots; a hash and the suffix do not."""
    return path.name.rsplit(".", 2)[0]
