"""What the compiler of output formats remembers and tries, in bounded memory and time."""

from __future__ import annotations

import asyncio

import pytest

from softbatch.server.request_failures import InvalidGrammar
from softbatch.server.requests import output_format
from softbatch.server.requests.output_format import CheckReply, GrammarCompiler, Key, OutputFormat
from softbatch.server.requests.schema_formats import without_other_formats
from tests.support.tokenizers_of_bytes import byte_level


class Refusing(GrammarCompiler):
    """Finds every format too complex, after a while."""

    def __init__(self) -> None:
        super().__init__(byte_level(), 256, [0])
        self.tried: list[str] = []

    async def _check(self, key: Key) -> CheckReply:
        self.tried.append(key[1])
        await asyncio.sleep(0.02)
        # Of the whole nothing can be made, of each part something.
        return CheckReply(reason="too complex") if key[1] == "whole" else CheckReply(grammar="x")


def test_parts_are_tried_for_a_bounded_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_format, "COMPILE_SECONDS", 0.05)
    parts = tuple(OutputFormat("json_schema", str(number), f"tools.{number}.parameters") for number in range(100))
    compiler = Refusing()
    with pytest.raises(InvalidGrammar, match="tools: too complex"):
        asyncio.run(compiler.compile(OutputFormat("grammar", "whole", "tools", parts)))
    assert compiler.tried[:2] == ["whole", "0"]
    assert len(compiler.tried) < 10


def test_what_is_known_is_bounded_in_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_format, "MAX_KNOWN_CHARS", 1000)
    compiler = GrammarCompiler(byte_level(), 256, [0])
    for number in [*range(20), 19, 19]:
        compiler._remember(("regex", f"{number:99}", "x"), CheckReply(grammar="x" * 100), 1.0)
    assert [key[1].strip() for key in compiler._known] == ["15", "16", "17", "18", "19"]
    assert compiler._known_chars == 1000


def test_formats_that_bind_nothing_are_left_out_where_they_are_formats() -> None:
    date, password = {"type": "string", "format": "date"}, {"type": "string", "format": "password"}
    schema = {
        "properties": {"format": password, "a": {"anyOf": [date, {"items": password}]}},
        "$defs": {"format": {"format": "no format"}},
        "enum": [{"format": "no format"}],
        "additionalProperties": password,
    }
    assert without_other_formats(schema) == {
        "properties": {"format": {"type": "string"}, "a": {"anyOf": [date, {"items": {"type": "string"}}]}},
        "$defs": {"format": {}},
        "enum": [{"format": "no format"}],
        "additionalProperties": {"type": "string"},
    }
