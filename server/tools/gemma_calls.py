"""Gemma's calls, `call:name{key:<escape>text<escape>,other:[1,true]}`: objects without quotes."""

from __future__ import annotations

import json
import re
from typing import Any

from softbatch.server.tools.whole_calls import Found, as_json

_CALL = re.compile(r"\s*call:\s*([\w.\-]+)\s*(?=\{)")
_BARE = re.compile(r"[^,\]}]*")
_KEY = re.compile(r"([^:{}\[\],]+):")
_MAX_DEPTH = 64


class _Text:
    """What is left to read, and the mark that stands for quotes."""

    def __init__(self, text: str, quote: str) -> None:
        self.text = text
        self.at = 0
        self._quote = quote

    def value(self, depth: int = 0) -> Any:
        """Raises ValueError for what is no value."""
        if depth > _MAX_DEPTH:
            raise ValueError
        self._skip()
        if self.text.startswith(self._quote, self.at):
            start = self.at + len(self._quote)
            end = self.text.index(self._quote, start)
            self.at = end + len(self._quote)
            return self.text[start:end]
        if self._take("{"):
            return dict(self._items("}", depth, with_keys=True))
        if self._take("["):
            return [value for _, value in self._items("]", depth, with_keys=False)]
        found = _BARE.match(self.text, self.at)
        word = found[0] if found else ""
        self.at += len(word)
        try:
            return json.loads(word)
        except ValueError:
            return word.strip()

    def _items(self, end: str, depth: int, with_keys: bool) -> list[tuple[str, Any]]:
        items: list[tuple[str, Any]] = []
        while not self._take(end):
            if items and not self._take(","):
                raise ValueError
            key = ""
            if with_keys:
                self._skip()
                if self.text.startswith(self._quote, self.at):
                    key = str(self.value(depth + 1))
                    if not self._take(":"):
                        raise ValueError
                else:
                    found = _KEY.match(self.text, self.at)
                    if found is None:
                        raise ValueError
                    key, self.at = found[1].strip(), found.end()
            items.append((key, self.value(depth + 1)))
        return items

    def _take(self, char: str) -> bool:
        self._skip()
        if self.text.startswith(char, self.at):
            self.at += 1
            return True
        return False

    def _skip(self) -> None:
        while self.text[self.at : self.at + 1].isspace():
            self.at += 1


def gemma_calls(text: str, quote: str) -> Found | None:
    """None for what is no call. The arguments may be JSON too."""
    found = _CALL.match(text)
    if found is None:
        return None
    written = text[found.end() :].strip()
    try:
        if isinstance(json.loads(written), dict):
            return [(found[1], written)]
    except (ValueError, RecursionError):
        pass
    reader = _Text(written, quote)
    try:
        value = reader.value()
        return [(found[1], as_json(value))] if reader.at == len(written) else None
    except ValueError:
        return None
