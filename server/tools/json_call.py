"""One call in JSON, `{"name": …, "arguments": {…}}`, read as it grows."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

_BLANK = re.compile(r"\s*")
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)
_STRING_STOP = re.compile(r'["\\]')
_SCALAR = re.compile(r"[^\s,}\]]+")
_NAMES = ("name", "function")
_ARGUMENTS = ("arguments", "parameters", "args")
_KEYS = (*_NAMES, *_ARGUMENTS, "type", "id")
EMPTY = "{}"


class JsonCall:
    """Has begun as soon as its name and the start of its arguments are known; what comes from then on is arguments,
    even if it is no JSON, until they are closed or `end_mark` stands outside of a string.

    It has failed if it turns out to be no call before it has begun; `rest` is then all of its text, else what is
    behind it. With `name` the text is the arguments alone. With `names` only those are known, and no other members are.
    """

    def __init__(self, end_mark: str = "", *, names: frozenset[str] | None = None, name: str | None = None) -> None:
        self.name = name
        self.has_begun = False
        self.has_ended = False
        self.has_failed = False
        self._names = names
        self._only_arguments = name is not None
        self._end_mark = end_mark
        self._structure = re.compile(f'["{{}}\\[\\]{re.escape(end_mark[:1])}]')
        self._text = ""
        self._at = 0
        self._key = _ARGUMENTS[0]
        self._start = 0
        self._depth = 0
        self._in_string = False
        self._streams = False
        self._arguments: str | None = None
        self._pieces: list[str] = []
        self._mode: Callable[[], bool] = self._value if self._only_arguments else self._opening

    @property
    def rest(self) -> str:
        return self._text if self.has_failed else self._text[self._at :]

    def push(self, text: str) -> None:
        self._text += text
        while not self.has_ended and self._mode():
            pass
        if self.has_begun and not self.has_ended:
            if self._streams:
                self._pieces.append(self._text[self._start : self._at])
            self._text, self._at, self._start = self._text[self._at :], 0, 0

    def finish(self) -> None:
        """No more text comes."""
        if self._in_string and self._streams:
            self._at = len(self._text)
        if not self.has_ended:
            self._broken()

    def take_arguments(self) -> str:
        """What is new of them."""
        pieces, self._pieces = self._pieces, []
        return "".join(pieces)

    def _next(self) -> str:
        """The next character behind blanks; empty if it is not there yet."""
        found = _BLANK.match(self._text, self._at)
        self._at = found.end() if found else self._at
        return self._text[self._at : self._at + 1]

    def _opening(self) -> bool:
        return self._expect({"{": self._member})

    def _member(self) -> bool:
        if self._next() == "}":
            return self._close()
        key = self._string()
        if key is None:
            return False
        if self._names is not None and key not in _KEYS:
            return self._broken()
        self._key = key
        self._mode = self._colon
        return True

    def _colon(self) -> bool:
        return self._expect({":": self._value})

    def _behind_value(self) -> bool:
        if self._next() == "}":
            return self._close()
        return self._expect({",": self._member})

    def _expect(self, modes: dict[str, Callable[[], bool]]) -> bool:
        char = self._next()
        if not char:
            return False
        if char not in modes:
            return self._broken()
        self._at += 1
        self._mode = modes[char]
        return True

    def _string(self) -> str | None:
        """The string that is due, decoded; None if it is not all there, or there is none."""
        char = self._next()
        if char and char != '"':
            self._broken()
            return None
        found = _STRING.match(self._text, self._at)
        if found is None:
            return None
        try:
            value = json.loads(found[0], strict=False)
        except ValueError:
            self._broken()
            return None
        self._at = found.end()
        return str(value)

    def _value(self) -> bool:
        char = self._next()
        if not char:
            return False
        self._start = self._at
        if char == '"':
            value = self._string()
            return value is not None and self._store(value, is_string=True)
        if char in "{[":
            self._depth = 0
            self._mode = self._container
            if char == "{" and self._key in _ARGUMENTS and self.name is not None and not self.has_begun:
                self.has_begun = self._streams = True
            return True
        found = _SCALAR.match(self._text, self._at)
        if found is not None and found.end() == len(self._text):
            return False
        try:
            json.loads(found[0] if found else "")
        except ValueError:
            return self._broken()
        self._at += len(found[0]) if found else 0
        return self._store(found[0] if found else "")

    def _container(self) -> bool:
        """An object or an array up to its end; kinds of brackets are not told apart."""
        text = self._text
        while True:
            found = (_STRING_STOP if self._in_string else self._structure).search(text, self._at)
            if found is None:
                self._at = len(text)
                return False
            char, at = found[0], found.start()
            if char == "\\":
                if at + 1 == len(text):
                    self._at = at
                    return False
                self._at = at + 2
                continue
            if char == '"':
                self._in_string = not self._in_string
            elif not self._in_string and char not in "{}[]":
                if text.startswith(self._end_mark, at):
                    self._at = at
                    return self._broken()
                if self._end_mark.startswith(text[at:]):
                    self._at = at
                    return False
            else:
                self._depth += 1 if char in "{[" else -1
            self._at = at + 1
            if not self._depth and char in "}]":
                return self._store(text[self._start : self._at])

    def _store(self, value: str, is_string: bool = False) -> bool:
        """A member's value: its JSON text, or what its string says."""
        if self._streams:
            self._pieces.append(value)
            self._streams = False
        elif self._key in _NAMES and self.name is None and is_string:
            if not value.isprintable() or not value or (self._names is not None and value not in self._names):
                return self._broken()
            self.name = value
        elif self._key in _ARGUMENTS and self._arguments is None:
            self._arguments = _as_object(value) if is_string else EMPTY if value == "null" else value
        self._mode = self._behind_value
        return self._close(0) if self._only_arguments else True

    def _close(self, length: int = 1) -> bool:
        if self.name is None or (self._arguments is None and not self.has_begun and self._names is not None):
            return self._broken()
        self._at += length
        if not self.has_begun:
            self.has_begun = True
            self._pieces.append(EMPTY if self._arguments is None else self._arguments)
        self.has_ended = True
        return False

    def _broken(self) -> bool:
        if self._streams:
            self._pieces.append(self._text[self._start : self._at])
            self._streams = False
        self.has_ended = True
        self.has_failed = not self.has_begun
        return False


def _as_object(value: str) -> str:
    """Arguments that a model has written as a string."""
    try:
        value.encode()
        is_object = isinstance(json.loads(value), dict)
    except (ValueError, RecursionError):  # of UTF-8 too, for lone surrogates
        is_object = False
    return value if is_object else json.dumps(value)
