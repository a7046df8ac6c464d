"""A file of requests on its way in: from a multipart body straight to the directory where it will lie."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, BinaryIO

from fastapi import Request
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect

from softbatch.server.batches.batch_files import BatchFiles
from softbatch.server.http.errors import ApiError, invalid
from softbatch.server.request_failures import printable, storage_failure
from softbatch.server.schemas.batches import LEAST_KEPT_SECONDS, MOST_KEPT_SECONDS

_EXPECTED = "send multipart/form-data with the fields 'purpose' and 'file'"
_ANCHOR, _SECONDS = "expires_after[anchor]", "expires_after[seconds]"
_FIELDS = frozenset({"purpose", "file", _ANCHOR, _SECONDS})
MAX_FIELD_BYTES = 1024
MAX_FILENAME_CHARS = 255

FILE_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["purpose", "file"],
                    "properties": {
                        "purpose": {"type": "string", "enum": ["batch"]},
                        "file": {
                            "type": "string",
                            "format": "binary",
                            "description": "a request a line: a JSON object with custom_id, method, url and body",
                        },
                        _ANCHOR: {"type": "string", "enum": ["created_at"]},
                        _SECONDS: {
                            "type": "integer",
                            "minimum": LEAST_KEPT_SECONDS,
                            "maximum": MOST_KEPT_SECONDS,
                            "description": "the file is deleted so long after it came; left out: 30 days",
                        },
                    },
                }
            }
        },
    }
}


@dataclass(frozen=True)
class BatchUpload:
    """A complete form; `file` is written, and not yet kept."""

    file: BinaryIO
    num_bytes: int
    filename: str
    keep_seconds: int | None


@contextlib.asynccontextmanager
async def read_batch_file(request: Request, files: BatchFiles) -> AsyncIterator[BatchUpload]:
    """Receive the form. Raises ApiError."""
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise ApiError(400, _EXPECTED, code="invalid_body")
    with files.upload() as file:
        try:
            form = await _ToDisk(request, file).parse()
        except MultiPartException as error:
            raise ApiError(400, f"{error.message.rstrip('.')}; {_EXPECTED}", code="invalid_body") from error
        except ClientDisconnect as error:
            raise ApiError(499, "the client closed the connection", code="client_closed_request") from error
        except OSError as error:
            raise storage_failure(error) from error
        yield _checked(form, file)


class _ToDisk(MultiPartParser):
    """Writes the form's one file to `target`, in threads and as it comes."""

    def __init__(self, request: Request, target: BinaryIO) -> None:
        super().__init__(
            request.headers, request.stream(), max_files=1, max_fields=len(_FIELDS), max_part_size=MAX_FIELD_BYTES
        )
        self._target = target

    def on_headers_finished(self) -> None:
        super().on_headers_finished()
        upload = self._current_part.file
        if upload is not None:
            upload.file.close()
            # Starlette asks whether it has left memory: what has no such mark is on disk.
            upload.file = self._target


def _checked(form: FormData, file: BinaryIO) -> BatchUpload:
    """Raises ApiError."""
    unknown = next((field for field in form if field not in _FIELDS), None)
    if unknown is not None:
        raise invalid(printable(unknown[:64]), f"unknown field; {_EXPECTED}", code="unknown_field")
    if form.getlist("purpose") != ["batch"]:
        raise invalid("purpose", "must be batch, the only purpose that this server knows")
    uploads = form.getlist("file")
    if len(uploads) != 1 or not isinstance(uploads[0], UploadFile):
        raise invalid("file", "must be one file; with curl: -F purpose=batch -F file=@requests.jsonl")
    upload = uploads[0]
    if not upload.size:
        raise invalid("file", "the file is empty")
    name = printable(PurePosixPath(upload.filename or "").name)[:MAX_FILENAME_CHARS] or "requests.jsonl"
    return BatchUpload(file, upload.size, name, _keep_seconds(form))


def _keep_seconds(form: FormData) -> int | None:
    """Raises ApiError."""
    anchors, seconds = form.getlist(_ANCHOR), form.getlist(_SECONDS)
    if not anchors and not seconds:
        return None
    if anchors != ["created_at"]:
        raise invalid(_ANCHOR, "must be created_at")
    text = str(seconds[0]) if len(seconds) == 1 else ""
    is_number = text.isascii() and text.isdigit() and len(text) <= 9
    if not is_number or not LEAST_KEPT_SECONDS <= int(text) <= MOST_KEPT_SECONDS:
        raise invalid(_SECONDS, f"must be a whole number from {LEAST_KEPT_SECONDS} to {MOST_KEPT_SECONDS}")
    return int(text)
