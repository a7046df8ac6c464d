"""The forms in which models write calls: how each is told from text, read, written and enforced."""

from __future__ import annotations

import json
import string
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from softbatch.server.tools.gemma_calls import gemma_calls
from softbatch.server.tools.json_calls import JsonCalls, JsonLayout
from softbatch.server.tools.message_parts import PartSink
from softbatch.server.tools.parser_names import CallFormatName
from softbatch.server.tools.whole_calls import BracketedCalls, MarkedCalls, Signatures, calls_in_code
from softbatch.server.tools.xml_calls import OPENING, XmlCalls, xml_arguments

MISTRAL_ID_LENGTH = 9  # the templates of Mistral's models refuse any other


class CallReader(Protocol):
    """Reads calls from behind their mark on, and tells the sink of them."""

    def read(self, text: str) -> str | None:
        """None while it needs more; else what is behind the calls, or all of the text if it is none."""
        ...

    def finish(self) -> str:
        """No more text comes: what is no call of what was read."""
        ...


@dataclass(frozen=True)
class CallFormat:
    """Calls stand behind any of `marks`, or, if a text begins with `bare`, without a mark. `tokens` are the words of
    the format that may be special tokens. `before`, `between` and `behind` enclose calls that are written as
    `head`, JSON arguments, `tail`; with `in_elements` each argument is an element of XML instead. `new_id` makes a
    call's id of 32 hexadecimal digits."""

    name: CallFormatName
    marks: tuple[str, ...]
    new_reader: Callable[[PartSink, Signatures, bool], CallReader]
    head: str
    tail: str
    before: str
    behind: str
    between: str
    bare: str = ""
    tokens: tuple[str, ...] = ()
    new_id: Callable[[str], str] = lambda drawn: f"call_{drawn[:24]}"
    in_elements: bool = False

    @property
    def is_marked(self) -> bool:
        """Whether the model writes a mark in front of each call."""
        return f"{self.before}{self.head}".startswith(self.marks[0])

    def write(self, calls: list[tuple[str, str]]) -> str:
        """Calls, each a name and its arguments in JSON, as the model would write them."""
        inner = xml_arguments if self.in_elements else str
        written = [self.head.replace("NAME", name) + inner(arguments) + self.tail for name, arguments in calls]
        return self.before + self.between.join(written) + self.behind


def mistral_id(drawn: str) -> str:
    letters = string.ascii_letters + string.digits
    number = int(drawn, 16)
    return "".join(letters[number // len(letters) ** place % len(letters)] for place in range(MISTRAL_ID_LENGTH))


def _json(layout: JsonLayout) -> Callable[[PartSink, Signatures, bool], CallReader]:
    def new_reader(sink: PartSink, signatures: Signatures, is_marked: bool) -> CallReader:
        return JsonCalls(layout, sink, None if is_marked else frozenset(signatures))

    return new_reader


def _bracketed(sink: PartSink, signatures: Signatures, is_marked: bool) -> CallReader:
    return BracketedCalls(sink, signatures)


def _elements(sink: PartSink, signatures: Signatures, is_marked: bool) -> CallReader:
    return XmlCalls(sink, signatures)


def _code(sink: PartSink, signatures: Signatures, is_marked: bool) -> CallReader:
    return MarkedCalls("```", partial(calls_in_code, signatures=signatures), sink)


def _gemma(end_mark: str, quote: str) -> Callable[[PartSink, Signatures, bool], CallReader]:
    def new_reader(sink: PartSink, signatures: Signatures, is_marked: bool) -> CallReader:
        return MarkedCalls(end_mark, partial(gemma_calls, quote=quote), sink)

    return new_reader


_MISTRAL = ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]")
CALL_FORMATS: dict[CallFormatName, CallFormat] = {
    found.name: found
    for found in (
        CallFormat(
            "hermes",
            ("<tool_call>",),
            _json(JsonLayout("</tool_call>", separators=";")),
            head='{"name": "NAME", "arguments": ',
            tail="}",
            before="<tool_call>\n",
            behind="\n</tool_call>",
            between="\n</tool_call>\n<tool_call>\n",
            bare="{",  # small models leave the marks out
            tokens=("<tool_call>", "</tool_call>"),
        ),
        CallFormat(
            "llama3_json",
            ("<|python_tag|>",),
            _json(JsonLayout(separators=";")),
            head='{"name": "NAME", "parameters": ',
            tail="}",
            before="",
            behind="",
            between="; ",
            bare="{",
            tokens=("<|python_tag|>",),
        ),
        CallFormat(
            "mistral",
            ("[TOOL_CALLS]",),
            _json(JsonLayout(named=True)),
            head="[TOOL_CALLS]NAME[ARGS]",
            tail="",
            before="",
            behind="",
            between="",
            tokens=_MISTRAL,
            new_id=mistral_id,
        ),
        CallFormat(
            "mistral_list",
            ("[TOOL_CALLS]",),
            _json(JsonLayout(named=True)),
            head='{"name": "NAME", "arguments": ',
            tail="}",
            before="[TOOL_CALLS] [",
            behind="]",
            between=", ",
            tokens=_MISTRAL,
            new_id=mistral_id,
        ),
        CallFormat(
            "gemma",
            ("```tool_code",),
            _code,
            head="NAME(**",
            tail=")",
            before="```tool_code\n",
            behind="\n```",
            between="\n",
        ),
        CallFormat(
            "functiongemma",
            ("<start_function_call>",),
            _gemma("<end_function_call>", "<escape>"),
            head="call:NAME",
            tail="",
            before="<start_function_call>",
            behind="<end_function_call>",
            between="<end_function_call><start_function_call>",
            tokens=("<start_function_call>", "<end_function_call>", "<escape>"),
        ),
        CallFormat(
            "gemma4",
            ("<|tool_call>",),
            _gemma("<tool_call|>", '<|"|>'),
            head="call:NAME",
            tail="",
            before="<|tool_call>",
            behind="<tool_call|>",
            between="<tool_call|><|tool_call>",
            tokens=("<|tool_call>", "<tool_call|>", '<|"|>'),
        ),
        CallFormat(
            "pythonic",
            ("<|python_start|>",),
            _bracketed,
            head="NAME(**",
            tail=")",
            before="[",
            behind="]",
            between=", ",
            bare="[",
            tokens=("<|python_start|>", "<|python_end|>"),
        ),
        CallFormat(
            "qwen3_coder",
            ("<tool_call>", OPENING),
            _elements,
            head="<function=NAME>\n",
            tail="</function>",
            before="<tool_call>\n",
            behind="\n</tool_call>",
            between="\n</tool_call>\n<tool_call>\n",
            tokens=("<tool_call>", "</tool_call>"),
            in_elements=True,
        ),
    )
}


def example(call_format: CallFormat) -> str:
    """How a call of two parameters looks, for models that were not told in training."""
    return call_format.write([("function_name", json.dumps({"parameter_name": "value"}))])
