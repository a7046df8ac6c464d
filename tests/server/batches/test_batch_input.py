"""What is wrong with a batch's file is told with its line, before any of its requests runs."""

from __future__ import annotations

import codecs
import json
from pathlib import Path
from typing import Any

import pytest

from softbatch.server.batches.batch_input import MAX_ERRORS, CheckedInput, body_of

URL = "/v1/completions"
BODY = {"prompt": "a", "max_tokens": 1}


def line(**fields: Any) -> bytes:
    known = {"custom_id": "a", "method": "POST", "url": URL, "body": BODY} | fields
    return json.dumps({name: value for name, value in known.items() if value is not ...}).encode()


def checked(tmp_path: Path, text: bytes, max_lines: int = 5) -> CheckedInput:
    path = tmp_path / "input.jsonl"
    path.write_bytes(text)
    found = CheckedInput("batch_1", URL, max_lines, 200)
    found.read(path)
    return found


@pytest.mark.parametrize(
    ("text", "code", "param", "number"),
    [
        (b"", "empty_file", None, None),
        (b"\n  \n", "empty_file", None, None),
        (b"{", "invalid_json_line", None, 1),
        (b"\n" + line(body=...) + b"}", "invalid_json_line", None, 2),
        (b"\xff\xfe", "invalid_json_line", None, 1),
        (b"[" * 10_000, "line_too_long", None, 1),
        (b"[" * 150, "invalid_json_line", None, 1),
        (b"[]", "invalid_line", None, 1),
        (b'"text"', "invalid_line", None, 1),
        (line(custom_id=...), "missing_required_parameter", "custom_id", 1),
        (line(body=...), "missing_required_parameter", "body", 1),
        (line(custom_id=7), "invalid_type", "custom_id", 1),
        (line(url=None), "invalid_type", "url", 1),
        (line(custom_id=""), "invalid_custom_id", "custom_id", 1),
        (line(method="GET"), "invalid_method", "method", 1),
        (line(url="/v1/embeddings"), "url_mismatch", "url", 1),
        (line(body=[]), "invalid_body", "body", 1),
        (line(body=None), "invalid_body", "body", 1),
        (line(priority=1), "unknown_field", "priority", 1),
        (line() + b"\n\n" + line(), "duplicate_custom_id", "custom_id", 3),
        (line(body={"prompt": "x" * 200}), "line_too_long", None, 1),
        (b"\n".join(line(custom_id=str(i)) for i in range(6)), "too_many_tasks", None, None),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, text: bytes, code: str, param: str | None, number: int | None) -> None:
    (error,) = checked(tmp_path, text).errors
    assert (error.code, error.param, error.line) == (code, param, number)
    assert param is None or param in error.message


def test_every_wrong_line_is_told_up_to_a_limit(tmp_path: Path) -> None:
    found = checked(tmp_path, b"\n".join([b"{"] * 3 + [line()]), 1)
    assert [error.line for error in found.errors] == [1, 2, 3]
    assert len(checked(tmp_path, b"{\n" * 500).errors) == MAX_ERRORS


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path: Path) -> None:
    found = checked(tmp_path, codecs.BOM_UTF8 + line() + b"\n" + line(custom_id="b"))
    assert not found.errors
    assert [json.loads(body_of(tmp_path / "input.jsonl", each)) for each in found.lines] == [BODY, BODY]


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\n\n \n"])
def test_bodies_are_read_as_they_were_written(tmp_path: Path, end: bytes) -> None:
    bodies = [b'{"prompt": "\\u00e9 \xc3\xa9",  "seed":1e2}', b'{"x":[{"y":"}{"}]}', b"{}"]
    parts = [
        b'{"custom_id":"%d","method":"POST","url":"%b","body":%b}' % (i, URL.encode(), body)
        for i, body in enumerate(bodies)
    ]
    found = checked(tmp_path, end.join(parts))
    assert not found.errors
    assert [body_of(tmp_path / "input.jsonl", each) for each in found.lines] == bodies
    (tmp_path / "input.jsonl").write_bytes(end.join(parts[::-1]))
    with pytest.raises(ValueError, match="not what it was"):
        body_of(tmp_path / "input.jsonl", found.lines[0])
