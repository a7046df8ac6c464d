"""The input file of a batch: one request a line, checked as a whole before the first of them runs."""

from __future__ import annotations

import codecs
from pathlib import Path
from typing import BinaryIO

import msgspec

from softbatch.server.batches.batch_record import LineError, PendingLine
from softbatch.server.request_failures import shown

MAX_CUSTOM_ID_CHARS = 512
MAX_ERRORS = 100


class InputLine(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`body` as it was written: the route reads it itself."""

    custom_id: str
    method: str
    url: str
    body: msgspec.Raw


class CheckedInput:
    """What is wrong with a file, at most MAX_ERRORS of it, and if nothing is, its lines."""

    def __init__(self, batch_id: str, endpoint: str, max_lines: int, max_line_bytes: int) -> None:
        self._batch_id = batch_id
        self._endpoint = endpoint
        self._max_lines = max_lines
        self._max_line_bytes = max_line_bytes
        self._numbers: dict[str, int] = {}  # by custom_id
        self.lines: list[PendingLine] = []
        self.errors: list[LineError] = []

    def read(self, path: Path) -> None:
        """Raises OSError."""
        with path.open("rb") as file:
            self._read(file)
        if not self.lines and not self.errors:
            self._add_error("empty_file", "the file has no requests; each of its lines is one, as a JSON object")

    def _read(self, file: BinaryIO) -> None:
        offset, number = 0, 0
        if file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8:
            offset = len(codecs.BOM_UTF8)
        file.seek(offset)
        while (text := file.readline(self._max_line_bytes + 1)) and len(self.errors) < MAX_ERRORS:
            number += 1
            if len(text) > self._max_line_bytes:
                self._add_error("line_too_long", f"a line may have {self._max_line_bytes} bytes", line=number)
                return
            if text.strip():
                if len(self.lines) == self._max_lines:
                    self._add_error("too_many_tasks", f"a batch may have {self._max_lines} requests, not more")
                    return
                self._read_line(text, number, offset)
            offset += len(text)

    def _read_line(self, text: bytes, number: int, offset: int) -> None:
        try:
            line = msgspec.json.decode(text, type=InputLine)
        except (msgspec.ValidationError, UnicodeDecodeError, RecursionError) as error:
            self._refuse_shape(text, number, error)
            return
        except msgspec.DecodeError:
            self._add_error("invalid_json_line", "this line is not valid JSON", line=number)
            return
        if (error_ := self._error_in(line, number)) is not None:
            self.errors.append(error_)
            return
        self._numbers[line.custom_id] = number
        self.lines.append(PendingLine(self._batch_id, number, line.custom_id, offset, len(text)))

    def _error_in(self, line: InputLine, number: int) -> LineError | None:
        if not 1 <= len(line.custom_id) <= MAX_CUSTOM_ID_CHARS:
            message = f"custom_id: must have from 1 to {MAX_CUSTOM_ID_CHARS} characters"
            return LineError(code="invalid_custom_id", message=message, param="custom_id", line=number)
        if (before := self._numbers.get(line.custom_id)) is not None:
            message = f"custom_id: {shown(line.custom_id)} is that of line {before} too; each must be another"
            return LineError(code="duplicate_custom_id", message=message, param="custom_id", line=number)
        if line.method != "POST":
            return LineError(code="invalid_method", message="method: must be POST", param="method", line=number)
        if line.url != self._endpoint:
            message = f"url: {shown(line.url)} is not the batch's endpoint, {self._endpoint}"
            return LineError(code="url_mismatch", message=message, param="url", line=number)
        if bytes(line.body)[:1] != b"{":
            return LineError(code="invalid_body", message="body: must be a JSON object", param="body", line=number)
        return None

    def _refuse_shape(self, text: bytes, number: int, error: Exception) -> None:
        """A line that is JSON, but no request."""
        try:
            found = msgspec.json.decode(text)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            self._add_error("invalid_json_line", "this line is not valid JSON", line=number)
            return
        if not isinstance(found, dict):
            self._add_error("invalid_line", "a line must be a JSON object", line=number)
            return
        fields = InputLine.__struct_fields__
        missing = next((name for name in fields if name not in found), None)
        unknown = next((name for name in found if name not in fields), None)
        if missing is not None:
            self._add_error("missing_required_parameter", f"{missing}: required, but missing", missing, number)
        elif unknown is not None:
            known = ", ".join(fields)
            self._add_error(
                "unknown_field", f"unknown field {shown(unknown)}; a line has {known}", unknown[:64], number
            )
        else:
            wrong = next((name for name in fields[:3] if not isinstance(found[name], str)), None)
            self._add_error("invalid_type", f"{wrong}: must be a text" if wrong else str(error), wrong, number)

    def _add_error(self, code: str, message: str, param: str | None = None, line: int | None = None) -> None:
        self.errors.append(LineError(code, message, param, line))


def body_of(path: Path, line: PendingLine) -> bytes:
    """The request of a line that was checked. Raises OSError, or ValueError if the file has changed since."""
    with path.open("rb") as file:
        file.seek(line.offset)
        text = file.read(line.length)
    try:
        found = msgspec.json.decode(text, type=InputLine)
    except msgspec.MsgspecError as error:
        raise ValueError("the batch's input file is not what it was") from error
    if found.custom_id != line.custom_id:
        raise ValueError("the batch's input file is not what it was")
    return bytes(found.body)
