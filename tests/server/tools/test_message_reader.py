"""Outputs of models as messages: however a text is cut, reasoning, calls and answer are the same."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from softbatch.server.tools.call_formats import CALL_FORMATS
from softbatch.server.tools.dialect import REASONING_FORMATS
from softbatch.server.tools.message_parts import CallArguments, CallStart, MessagePart, ReadMessage
from softbatch.server.tools.message_reader import MAX_FALSE_MARKS, MessageReader
from softbatch.server.tools.parser_names import CallFormatName

SIGNATURES = {"f": ("a", "b"), "get_weather": ("city", "unit"), "g": ()}
THINK = REASONING_FORMATS["think"]
PARIS = '{"city": "Paris"}'


def reader_of(name: CallFormatName | None, *, thinks: bool = True, parallel: bool = True) -> MessageReader:
    calls = CALL_FORMATS[name] if name else None
    return MessageReader(calls, THINK, SIGNATURES, is_thinking=not thinks, parallel=parallel)


def parts_of(reader: MessageReader, pieces: list[str]) -> list[MessagePart]:
    return [part for piece in pieces for part in reader.push(piece)] + reader.finish()


def read(name: CallFormatName | None, text: str) -> tuple[str, str, list[tuple[str, str]]]:
    """Content, reasoning and calls, the same in one piece and by characters."""
    whole, single = (ReadMessage.of(parts_of(reader_of(name), pieces)) for pieces in ([text], list(text)))
    results = [
        (one.content, one.reasoning, [(call.name, call.arguments) for call in one.calls]) for one in (whole, single)
    ]
    assert results[0] == results[1]
    return results[0]


@pytest.mark.parametrize(
    ("name", "text", "content", "calls"),
    [
        ("hermes", f'<tool_call>\n{{"name": "f", "arguments": {PARIS}}}\n</tool_call>', "", [("f", PARIS)]),
        ("hermes", 'Let me see.\n<tool_call>{"name":"f","arguments":{}}</tool_call>\n', "Let me see.", [("f", "{}")]),
        (
            "hermes",
            '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>\n'
            '<tool_call>{"arguments": {"b": "}"}, "name": "g"}</tool_call>',
            "",
            [("f", '{"a": 1}'), ("g", '{"b": "}"}')],
        ),
        ("hermes", '<tool_call>{"name": "f"}</tool_call>', "", [("f", "{}")]),
        ("hermes", '{"name": "f", "arguments": {"a": 1}}\n</tool_call>', "", [("f", '{"a": 1}')]),
        ("hermes", '{"name": "f", "arguments": {}}\n{"a": 1}', '{"a": 1}', [("f", "{}")]),
        ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("f", '{"a": 1}')]),
        (
            "hermes",
            '<tool_call>[{"name": "f", "arguments": null}, {"name": "g"}]</tool_call>.',
            ".",
            [("f", "{}"), ("g", "{}")],
        ),
        (
            "hermes",
            '<tool_call>{"name": "f", "arguments": {"a": "</tool_call>"}}</tool_call>',
            "",
            [("f", '{"a": "</tool_call>"}')],
        ),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1}</tool_call> ok', "ok", [("f", '{"a": 1}')]),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1}}}\n</tool_call>', "", [("f", '{"a": 1}')]),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "1', "", [("f", '{"a": "1')]),
        ("llama3_json", '{"name": "f", "parameters": {"a": 1}}', "", [("f", '{"a": 1}')]),
        ("llama3_json", '\n<|python_tag|>{"name": "f", "parameters": {"a": 1}}', "", [("f", '{"a": 1}')]),
        (
            "llama3_json",
            '{"name": "f", "parameters": {"a": 1}}; {"type": "function", "name": "g", "parameters": {}}',
            "",
            [("f", '{"a": 1}'), ("g", "{}")],
        ),
        ("mistral", f"[TOOL_CALLS]f[ARGS]{PARIS}", "", [("f", PARIS)]),
        ("mistral", '[TOOL_CALLS]f[CALL_ID]abc[ARGS]{"a": [1]}[TOOL_CALLS]g{}', "", [("f", '{"a": [1]}'), ("g", "{}")]),
        ("mistral", f'[TOOL_CALLS] [{{"name": "f", "arguments": {PARIS}, "id": "abcdefghi"}}]', "", [("f", PARIS)]),
        (
            "mistral_list",
            'Hm. [TOOL_CALLS][{"name": "f", "arguments": {}}, {"name": "g", "arguments": {}}]',
            "Hm.",
            [("f", "{}"), ("g", "{}")],
        ),
        (
            "gemma",
            "```tool_code\nget_weather(city='Paris', unit=None)\n```",
            "",
            [("get_weather", '{"city": "Paris", "unit": null}')],
        ),
        (
            "gemma",
            "Sure:\n```tool_code\nprint(get_weather('Paris'))\ng()\n```\nDone",
            "Sure:\nDone",
            [("get_weather", PARIS), ("g", "{}")],
        ),
        (
            "functiongemma",
            "<start_function_call>call:f{a:<escape>x, }y<escape>,b:[1,{c:true}]}<end_function_call>",
            "",
            [("f", '{"a": "x, }y", "b": [1, {"c": true}]}')],
        ),
        ("gemma4", '<|tool_call>call:f{"a": 1}<tool_call|>', "", [("f", '{"a": 1}')]),
        ("gemma4", '<|tool_call>call:f{city:<|"|>Paris<|"|>}<tool_call|>', "", [("f", PARIS)]),
        ("pythonic", '[f(a=1, b=-2.5), g(b="x)]")]', "", [("f", '{"a": 1, "b": -2.5}'), ("g", '{"b": "x)]"}')]),
        (
            "pythonic",
            "[f(a=true, b={'k': [None, (1,)]}, **{'a-b': 1})]",
            "",
            [("f", '{"a": true, "b": {"k": [null, [1]]}, "a-b": 1}')],
        ),
        (
            "qwen3_coder",
            "See:\n<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\n<parameter=b>\nx\n\ny\n</parameter>\n"
            "</function>\n</tool_call>\n<tool_call><function=g></function></tool_call>",
            "See:",
            [("f", '{"a": 1, "b": "x\\n\\ny"}'), ("g", "{}")],
        ),
        # Marks that models forget.
        ("qwen3_coder", "<function=f>\n<parameter=a>\nTrue\n</function> ok", "ok", [("f", '{"a": true}')]),
        (
            "qwen3_coder",
            "A.<function=f><parameter=a>[1]<parameter=b>{</parameter></function></tool_call>",
            "A.",
            [("f", '{"a": [1], "b": "{"}')],
        ),
        (
            "qwen3_coder",
            "<function=f>\n<parameter=a>\n\n x \n\n</parameter>\n"
            "<parameter= b >\ny </p> \n\n<parameter=c>\n</function>",
            "",
            [("f", '{"a": "\\n x \\n", "b": "y </p>", "c": ""}')],
        ),
    ],
)
def test_each_form_is_read(name: CallFormatName, text: str, content: str, calls: list[tuple[str, str]]) -> None:
    assert read(name, text) == (content, "", calls)
    # Behind reasoning too.
    assert read(name, f"<think>\nHm.\n</think>\n\n{text}") == (content, "Hm.", calls)


@pytest.mark.parametrize("name", CALL_FORMATS)
def test_what_a_form_writes_it_reads(name: CallFormatName) -> None:
    calls = [("f", '{"a": "x\\n\\"", "b": [1, 2.5, {"c": true}]}'), ("get_weather", '{"city": "Zürich 日本"}')]
    content, _, found = read(name, CALL_FORMATS[name].write(calls))
    assert content == ""
    assert [(one, json.loads(arguments)) for one, arguments in found] == [(one, json.loads(a)) for one, a in calls]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("hermes", "<tool_call>"),
        ("hermes", "<tool_call>oops</tool_call>"),
        ("hermes", '<tool_call>{"name": 3, "arguments": {}}</tool_call>'),
        ("hermes", '<tool_call>{"name": "f\\ud800"}</tool_call>'),
        ("hermes", '<tool_call>{"nam'),
        ("hermes", 'A <tool_call\n> of {"name": "f", "arguments": {}}'),
        ("llama3_json", '{"name": "Bob", "parameters": {}}'),
        ("llama3_json", '{"name": "f", "age": 3}'),
        ("llama3_json", '{"city": "Paris"}'),
        ("llama3_json", 'In JSON: {"name": "f", "parameters": {}}'),
        ("mistral", "[TOOL_CALLS]"),
        ("mistral", "[TOOL_CALLS]f[ARGS] none"),
        ("gemma", "```tool_code\nimport os\nos.remove('x')\n```"),
        ("gemma", "```tool_code\nf(open)\n```"),
        ("gemma", "```python\nf(a=1)\n```"),
        ("functiongemma", "<start_function_call>call:f{a<end_function_call>"),
        ("functiongemma", "<start_function_call>call:f{a:" + "[" * 500 + "<end_function_call>"),
        ("qwen3_coder", "<tool_call>\n<function=f>\nno parameter\n</function>\n</tool_call>"),
        ("qwen3_coder", "<function=f>\n<parameter=a>"),
        ("qwen3_coder", "<function= >x</function>"),
        ("pythonic", "[1, 2, 3]"),
        ("pythonic", "[unknown(a=1)]"),
        ("pythonic", "[f(a=x)]"),
        ("pythonic", "[f(a=1)"),
        ("pythonic", "[f(" + "(" * 3000 + ")" * 3000 + ")]"),
        ("pythonic", "[f(a=1e999)]"),
        ("pythonic", "[f(a='\\0')]x"[:8]),
    ],
)
def test_what_is_no_call_stays_text(name: CallFormatName, text: str) -> None:
    assert read(name, text) == (text, "", [])


def test_text_around_calls_stays_text() -> None:
    text = 'One <tool_call>no</tool_call> two\n\n<tool_call>{"name": "f", "arguments": {}}</tool_call>\n three '
    content, _, calls = read("hermes", text)
    assert calls == [("f", "{}")]
    assert content == "One <tool_call>no</tool_call> two\n three "


def test_arguments_come_as_they_are_written() -> None:
    reader = reader_of("hermes")
    assert reader.push('<tool_call>{"name": "f", "arg') == []
    begin, first = reader.push('uments": {"a": "Par')
    assert isinstance(begin, CallStart)
    assert first == CallArguments(0, '{"a": "Par')
    assert reader.push('is"}') == [CallArguments(0, 'is"}')]
    assert reader.push("}</tool_call>") + reader.finish() == []


def test_without_parallel_calls_the_first_is_all() -> None:
    text = CALL_FORMATS["hermes"].write([("f", "{}"), ("g", "{}")])
    message = ReadMessage.of(parts_of(reader_of("hermes", parallel=False), [text]))
    assert [call.name for call in message.calls] == ["f"]
    assert message.content == ""


@pytest.mark.parametrize(
    ("text", "content", "reasoning"),
    [
        ("<think>\nHm\n</think>\n\nYes", "Yes", "Hm"),
        ("<think></think>Yes", "Yes", ""),
        ("<think>no end", "", "no end"),
        ("<think>a</think>b<think>c</think>", "b<think>c</think>", "a"),
        ("<thin", "<thin", ""),
        (" <think> x ", "", "x "),
        ("Yes </think>", "Yes </think>", ""),
    ],
)
def test_reasoning_is_told_apart(text: str, content: str, reasoning: str) -> None:
    for name in (None, "hermes"):
        assert read(name, text) == (content, reasoning, [])


def test_reasoning_may_be_open_already() -> None:
    parts = parts_of(reader_of(None, thinks=False), ["\nH", "m\n</th", "ink>\n\nYes"])
    assert ReadMessage.of(parts) == ReadMessage("Yes", "Hm")


def test_many_marks_cost_little() -> None:
    text = '<tool_call>{"arguments":{' * (MAX_FALSE_MARKS + 300)
    assert read("hermes", text) == (text, "", [])


BLANKS = "\n" * 100_000


@pytest.mark.parametrize(
    ("name", "text", "calls"),
    [
        (
            "qwen3_coder",
            f"<function=f><parameter=a>{BLANKS}x</parameter></function>",
            [("f", json.dumps({"a": BLANKS[1:] + "x"}))],
        ),
        ("qwen3_coder", f"<function=f><parameter=a>1{BLANKS}<parameter=b>2</function>", [("f", '{"a": 1, "b": 2}')]),
        ("qwen3_coder", f"<tool_call><function=f><parameter={BLANKS}</function>", []),
        ("qwen3_coder", f"<tool_call><function=f><parameter=a{' ' * len(BLANKS)}</function>", []),
        ("gemma4", f"<|tool_call>call:f{{a{BLANKS}:1}}<tool_call|>", [("f", '{"a": 1}')]),
        ("gemma4", f"<|tool_call>call:f{{a{BLANKS}}}<tool_call|>", []),
        ("mistral", f"[TOOL_CALLS]f{BLANKS}x", []),
    ],
    ids=range(7),
)
def test_many_blanks_cost_little(name: CallFormatName, text: str, calls: list[tuple[str, str]]) -> None:
    """As every way to part them is not tried: that would take minutes."""
    message = ReadMessage.of(parts_of(reader_of(name), [text]))
    assert [(call.name, call.arguments) for call in message.calls] == calls
    assert message.content == ("" if calls else text)


WORDS = [
    *{token for one in CALL_FORMATS.values() for token in (*one.tokens, *one.marks, one.bare, one.head)},
    *("<think>", "</think>", "{", "}", "[", "]", "(", ")", '"', "'", "\\", ",", ";", ":", " ", "\n", "f", "g(", "a=1"),
    *('{"name": "f", "arguments": ', '"parameters": {', '{"a": 1}', '"x"', "call:f{a:1}", "null", "```", "</tool", "é"),
]


@settings(max_examples=100, deadline=None)
@given(
    name=st.sampled_from([None, *CALL_FORMATS]),
    text=st.lists(st.sampled_from(WORDS) | st.text(max_size=3), max_size=14).map("".join),
    cuts=st.lists(st.integers(0, 200), max_size=20),
    thinks=st.booleans(),
    parallel=st.booleans(),
)
def test_however_a_text_is_cut_it_is_read_the_same(
    name: CallFormatName | None, text: str, cuts: list[int], thinks: bool, parallel: bool
) -> None:
    ends = sorted({min(cut, len(text)) for cut in cuts} | {0, len(text)})
    pieces = [text[a:b] for a, b in itertools.pairwise(ends)]
    whole, cut = (
        ReadMessage.of(parts_of(reader_of(name, thinks=thinks, parallel=parallel), one)) for one in ([text], pieces)
    )
    for message in (whole, cut):
        for call in message.calls:
            call.id = ""
    assert cut == whole
    assert not whole.calls or name
    if thinks and not whole.calls and "think>" not in text:
        assert whole.content == text
    whole.content.encode() if text.isascii() else None
