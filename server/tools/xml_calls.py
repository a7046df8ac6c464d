"""Calls whose parameters are elements, `<function=f><parameter=a>1</parameter></function>`, as of Qwen3-Coder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import regex

from softbatch.server.tools.message_parts import PartSink
from softbatch.server.tools.value_kinds import kinds_allowed, kinds_of
from softbatch.server.tools.whole_calls import MAX_CHARS, Signatures, as_json

OPENING = "<function="
_CLOSING = "</function>"
_NAME = regex.compile(r"\s*<function=\s*([\w.\-]{1,256})\s*>")
_PARAMETER = "<parameter="
# A value ends with its mark or, as models forget it, with whatever follows.
_VALUE_END = regex.compile(f"</parameter>|{_PARAMETER}")
_BLANKS = regex.compile(r"\s*+")
_MAX_KEY_CHARS = 256
_NOT_JSON = {"True": True, "False": False, "None": None}


class XmlCalls:
    """Reads the calls between one pair of marks. The first mark may be missing, and then the calls' own has been read
    by whoever found them: a text that begins with a name stands behind it."""

    def __init__(self, sink: PartSink, signatures: Signatures) -> None:
        self._sink = sink
        self._signatures = signatures
        self._text = ""
        self._lent = ""
        self._num_read = 0

    def read(self, text: str) -> str | None:
        """None while calls may follow; else what is behind them."""
        if not self._text and not self._num_read and regex.match(r"[\w.\-]", text):
            self._lent = OPENING
        self._text += text
        while True:
            bare = (self._lent + self._text).lstrip()
            if self._num_read and bare.startswith("</tool_call>"):
                return bare.removeprefix("</tool_call>")
            if not bare.startswith(OPENING):
                may_follow = OPENING.startswith(bare) or (self._num_read and "</tool_call>".startswith(bare))
                return None if may_follow else self._give_back()
            end = bare.find(_CLOSING, max(0, len(bare) - len(text) - len(_CLOSING)))
            if end < 0:
                return None if len(bare) <= MAX_CHARS else self._give_back()
            if not self._tell(bare[:end]):
                return self._give_back()
            self._text, self._lent = bare[end + len(_CLOSING) :], ""

    def finish(self) -> str:
        """Cut off within the mark that would have closed them, nothing is left."""
        is_closing = self._num_read and "</tool_call>".startswith(self._text.strip())
        return "" if is_closing else self._give_back()

    def _give_back(self) -> str:
        return self._text

    def _tell(self, call: str) -> bool:
        found = _NAME.match(call)
        if found is None:
            return False
        arguments = _arguments(call[found.end() :], _types(self._signatures, found[1]))
        if arguments is None:
            return False
        self._num_read += 1
        self._sink.begin(found[1])
        self._sink.arguments(arguments)
        return True


def _types(signatures: Signatures, name: str) -> Mapping[str, Any]:
    known = signatures.get(name, ())
    return known if isinstance(known, Mapping) else {}


def _arguments(text: str, types: Mapping[str, Any]) -> str | None:
    """JSON; None for what is nothing but parameters."""
    arguments: dict[str, Any] = {}
    at = _behind_blanks(text, 0)
    while at < len(text):
        opening = text.find(">", at)
        key = text[at + len(_PARAMETER) : opening].strip()
        if opening < 0 or not text.startswith(_PARAMETER, at) or not _is_key(key):
            return None
        end = _VALUE_END.search(text, opening + 1)
        value = text[opening + 1 : end.start() if end else len(text)].removeprefix("\n")
        if end is not None and end[0] == _PARAMETER:
            value, at = value.rstrip(), end.start()
        else:
            value, at = value.removesuffix("\n"), _behind_blanks(text, end.end() if end else len(text))
        arguments[key] = _value(value, types.get(key))
    try:
        return as_json(arguments)
    except (ValueError, RecursionError):
        return None


def _behind_blanks(text: str, at: int) -> int:
    found = _BLANKS.match(text, at)
    return found.end() if found else at


def _is_key(text: str) -> bool:
    return 0 < len(text) <= _MAX_KEY_CHARS and not regex.search(r"[<\n]", text)


def is_plain_text(schema: Any) -> bool:
    """Whether a value by this schema is a text, which is written as it is."""
    if not isinstance(schema, Mapping):
        return False
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if isinstance(values, list) and values:
        return all(isinstance(value, str) for value in values)
    return schema.get("type") == "string"


def _value(text: str, schema: Any) -> Any:
    """As the schema says. Where it allows a text among others, all that is none of the others is one; where it says
    nothing, what is JSON is no text."""
    if is_plain_text(schema):
        return text
    word = text.strip()
    try:
        value = _NOT_JSON[word] if word in _NOT_JSON else json.loads(word)
        json.dumps(value, allow_nan=False)
    except (ValueError, RecursionError):
        return text
    kinds = kinds_allowed(schema)
    return text if "string" in kinds and not kinds & kinds_of(value) else value


def xml_arguments(arguments: str) -> str:
    """JSON arguments as parameters; broken JSON stays as it is."""
    try:
        values = json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
    if not isinstance(values, dict):
        return arguments
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()}
    return "".join(f"<parameter={key}>\n{text}\n</parameter>\n" for key, text in texts.items())
