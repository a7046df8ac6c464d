"""The rule that names of soft prompts keep."""

from __future__ import annotations

import re

from softbatch.prompt_store.manifest import SoftPromptError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def is_name(text: str) -> bool:
    """Whether a soft prompt may have this name; such a name is also a file's name without its suffix."""
    return _NAME.fullmatch(text) is not None


def check_name(text: str) -> None:
    """Raises SoftPromptError invalid_name."""
    if not is_name(text):
        raise SoftPromptError(
            "name: use 1 to 128 of the characters A-Z a-z 0-9 . _ - and begin with a letter or digit",
            param="name",
            code="invalid_name",
        )
