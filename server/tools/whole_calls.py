"""Calls that can be told from other text only when all of them is there: those written as code, and Gemma's own."""

from __future__ import annotations

import ast
import json
import warnings
from collections.abc import Callable, Collection, Mapping
from typing import Any

import regex

from softbatch.server.tools.message_parts import PartSink

# The name of each tool, with the names of its parameters in order, which may lead to their schemas.
Signatures = Mapping[str, Collection[str]]
Found = list[tuple[str, str]]
MAX_CHARS = 1 << 17
_SHOULD_BE_CALLS = regex.compile(r"\[\s*([A-Za-z_][\w.]{0,255})\s*\(")
_LITERALS = {"true": True, "false": False, "null": None, "none": None}
_CODE_STOP = regex.compile(r"[\"'\\()\[\]{}`]")


class BracketedCalls:
    """`[f(a=1), g(b="x")]` at the start of a text; of tools that are known, as lists are ordinary text too."""

    def __init__(self, sink: PartSink, signatures: Signatures) -> None:
        self._sink = sink
        self._signatures = signatures
        self._text = ""
        self._scan = _CodeScan()

    def read(self, text: str) -> str | None:
        self._text += text
        begins = _SHOULD_BE_CALLS.match(self._text, partial=True)
        if begins is None or (not begins.partial and begins[1] not in self._signatures):
            return self._text
        end = self._scan.end_of_brackets(self._text)
        if end is None and len(self._text) <= MAX_CHARS:
            return None
        calls = None if end is None else calls_in_code(self._text[:end], self._signatures)
        if calls is None:
            return self._text
        _tell(self._sink, calls)
        return self._text[end:]

    def finish(self) -> str:
        return self._text


class MarkedCalls:
    """Calls up to an end mark; `parse` says what is between."""

    def __init__(self, end_mark: str, parse: Callable[[str], Found | None], sink: PartSink) -> None:
        self._end_mark = end_mark
        self._parse = parse
        self._sink = sink
        self._text = ""

    def read(self, text: str) -> str | None:
        seen = max(0, len(self._text) - len(self._end_mark))
        self._text += text
        end = self._text.find(self._end_mark, seen)
        if end < 0:
            return None if len(self._text) <= MAX_CHARS else self._text
        calls = self._parse(self._text[:end])
        if calls is None:
            return self._text
        _tell(self._sink, calls)
        return self._text[end + len(self._end_mark) :]

    def finish(self) -> str:
        return self._text


def _tell(sink: PartSink, calls: Found) -> None:
    for name, arguments in calls:
        sink.begin(name)
        sink.arguments(arguments)


class _CodeScan:
    """Finds the end of the brackets that a text begins with; strings are told apart from code."""

    def __init__(self) -> None:
        self._at = 0
        self._depth = 0
        self._quote = ""

    def end_of_brackets(self, text: str) -> int | None:
        """None while they are open."""
        while found := _CODE_STOP.search(text, self._at):
            char, at = found[0], found.start()
            if char == "\\":
                if at + 1 == len(text):
                    self._at = at
                    return None
                at += 1
            elif self._quote:
                self._quote = "" if char == self._quote else self._quote
            elif char in "\"'":
                self._quote = char
            elif char in "([{":
                self._depth += 1
            elif char in ")]}":
                self._depth -= 1
            self._at = at + 1
            if not self._depth and not self._quote and char in ")]}":
                return self._at
        self._at = len(text)
        return None


def calls_in_code(code: str, signatures: Signatures) -> Found | None:
    """The calls of Python code that is nothing but calls with plain values, in a list or one a line; else None."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes that Python does not know
            tree = ast.parse(code.strip())
        nodes = [node for statement in tree.body for node in _calls_of(statement)]
        return [_call(node, signatures) for node in nodes] or None
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError, OverflowError):
        return None


def _calls_of(statement: ast.stmt) -> list[ast.expr]:
    if not isinstance(statement, ast.Expr):
        raise ValueError
    value = statement.value
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id == "print" and value.args:
        return list(value.args)
    return value.elts if isinstance(value, ast.List) else [value]


def _call(node: ast.expr, signatures: Signatures) -> tuple[str, str]:
    if not isinstance(node, ast.Call):
        raise ValueError
    name = ast.unparse(node.func)
    if not all(part.isidentifier() for part in name.split(".")):
        raise ValueError
    names = signatures.get(name, ())
    if len(node.args) > len(names):
        raise ValueError
    arguments = {name: _value(arg) for name, arg in zip(names, node.args, strict=False)}
    for keyword in node.keywords:
        value = _value(keyword.value)
        if keyword.arg is not None:
            arguments[keyword.arg] = value
        elif isinstance(value, dict):
            arguments |= value
        else:
            raise ValueError
    return name, as_json(arguments)


def _value(node: ast.expr) -> Any:
    """A plain value; JSON's words for true, false and null are known too."""
    if isinstance(node, ast.Name) and node.id in _LITERALS:
        return _LITERALS[node.id]
    if isinstance(node, ast.List | ast.Tuple):
        return [_value(item) for item in node.elts]
    if isinstance(node, ast.Dict):
        keys = [ast.literal_eval(key) if key is not None else None for key in node.keys]
        if not all(isinstance(key, str) for key in keys):
            raise ValueError
        return dict(zip(keys, map(_value, node.values), strict=True))
    value = ast.literal_eval(node)
    if value is not None and not isinstance(value, str | int | float | bool):
        raise ValueError
    return value


def as_json(value: Any) -> str:
    """Raises ValueError for what JSON has no words for."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # lone surrogates
        return json.dumps(value)
    return text
