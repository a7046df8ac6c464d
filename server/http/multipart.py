"""A soft prompt on its way in: from a multipart body over temporary files to the store."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from fastapi import Request
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect

from softbatch.prompt_store.compression.data.context_text import ContextTextError, clean_context
from softbatch.prompt_store.names import check_name
from softbatch.prompt_store.peft import import_peft, looks_like_peft_zip
from softbatch.prompt_store.soft_prompt_file import save
from softbatch.prompt_store.stores.kept_text import (
    DEFAULT_RECALL,
    MAX_KEPT_BYTES,
    MAX_RECALL,
    KeptText,
    check_kept,
)
from softbatch.prompt_store.stores.store import StoredPrompt
from softbatch.server.http.errors import ApiError, invalid
from softbatch.server.request_failures import shown
from softbatch.server.services import Services

MAX_FILES = 2
MAX_FIELDS = 4
MAX_FIELD_BYTES = MAX_KEPT_BYTES + 1
# Kept for the importers, which tell files apart by them; nothing else of a client's file name is used.
SUFFIXES = frozenset({".json", ".safetensors", ".zip", ".bin", ".pt", ".pth"})
_EXPECTED = "send multipart/form-data with the fields 'name' and 'file'"

UPLOAD_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["name", "file"],
                    "properties": {
                        "name": {
                            "type": "string",
                            "example": "manual",
                            "description": "what requests call it; put it before the files, to be told early "
                            "when it is taken",
                        },
                        "file": {
                            "type": "array",
                            "items": {"type": "string", "format": "binary"},
                            "minItems": 1,
                            "maxItems": MAX_FILES,
                            "description": "a soft prompt's .safetensors; or a PEFT adapter's two files, "
                            "adapter_config.json and adapter_model.safetensors; or a zip of its folder",
                        },
                        "text": {
                            "type": "string",
                            "description": "the text that it was made of: kept, private to the server, for requests "
                            f"that recall passages of it; at most {MAX_KEPT_BYTES} bytes",
                        },
                        "recall": {
                            "type": "integer",
                            "minimum": 0,
                            "maximum": MAX_RECALL,
                            "default": DEFAULT_RECALL,
                            "description": "passages of `text` that a request gets which does not say",
                        },
                    },
                }
            }
        },
    }
}


@dataclass(frozen=True)
class Upload:
    """A complete form: a name that was free a moment ago, one or two files that are not empty, and a text to keep."""

    name: str
    files: list[UploadFile]
    kept: KeptText | None = None


@contextlib.asynccontextmanager
async def read_upload(request: Request, services: Services) -> AsyncIterator[Upload]:
    """Receive the form; files over a mebibyte go to disk. Raises ApiError or the store's error."""

    def check(name: str) -> None:
        if name in (services.model_name, services.settings.model):
            message = f"name: {shown(name)} is the name of the base model; choose another"
            raise ApiError(409, message, param="name", code="name_taken")
        check_name(name)

    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise ApiError(400, _EXPECTED, code="invalid_body")
    try:
        form = await _Parser(request, check, services.store.check_free).parse()
    except MultiPartException as error:
        raise ApiError(400, f"{error.message.rstrip('.')}; {_EXPECTED}", code="invalid_body") from error
    except ClientDisconnect as error:
        raise ApiError(499, "the client closed the connection", code="client_closed_request") from error
    try:
        yield _checked(form)
    finally:
        await form.close()


def register(services: Services, upload: Upload) -> StoredPrompt:
    """Import if need be, check everything, and store. Blocks. Raises SoftPromptError."""
    max_bytes = services.settings.max_prompt_mib << 20
    with tempfile.TemporaryDirectory(prefix="upload-", dir=services.temporary) as folder:
        paths = [Path(folder) / f"{index}{_suffix(file)}" for index, file in enumerate(upload.files)]
        for path, file in zip(paths, upload.files, strict=True):
            with path.open("xb") as target:
                shutil.copyfileobj(file.file, target)
        path = paths[0]
        if len(paths) > 1 or looks_like_peft_zip(path):
            prompt = import_peft(paths if len(paths) > 1 else path, services.spec, max_bytes, _base_weight(services))
            path = Path(folder) / "imported.safetensors"
            save(prompt, path)
        return services.store.add(upload.name, path, services.spec, upload.kept)


def _base_weight(services: Services) -> Callable[[str], Any]:
    from softbatch.scheduler.model.weight_files import stored_weight

    info = services.supervisor.info
    return lambda name: None if info is None else stored_weight(info.model.tokenizer_path, name)


class _Parser(MultiPartParser):
    """Shows the name to `check` as soon as it is there, and to `check_free`, which may block, in a thread, before the
    files behind it are received."""

    def __init__(self, request: Request, check: Callable[[str], None], check_free: Callable[[str], None]) -> None:
        super().__init__(
            request.headers,
            self._received(request),
            max_files=MAX_FILES,
            max_fields=MAX_FIELDS,
            max_part_size=MAX_FIELD_BYTES,
        )
        self._check, self._check_free = check, check_free
        self._new_name: str | None = None

    def on_part_end(self) -> None:
        super().on_part_end()
        field, value = self.items[-1]
        if field == "name" and isinstance(value, str):
            self._check(value)
            self._new_name = value

    async def _received(self, request: Request) -> AsyncGenerator[bytes, None]:
        async for chunk in request.stream():
            yield chunk
            if self._new_name is not None:
                name, self._new_name = self._new_name, None
                await asyncio.to_thread(self._check_free, name)


def _checked(form: FormData) -> Upload:
    """Raises ApiError."""
    unknown = next((field for field in form if field not in ("name", "file", "text", "recall")), None)
    if unknown is not None:
        raise invalid(unknown[:64], f"unknown field; {_EXPECTED}", code="unknown_field")
    names = form.getlist("name")
    if len(names) != 1 or not isinstance(names[0], str):
        raise invalid("name", f"must be given once, as a text; {_EXPECTED}")
    files = [file for file in form.getlist("file") if isinstance(file, UploadFile)]
    if not files or len(files) != len(form.getlist("file")):
        raise invalid("file", f"must be one or {MAX_FILES} files; with curl: -F file=@manual.safetensors")
    if not all(file.size for file in files):
        raise invalid("file", "the file is empty")
    return Upload(names[0], files, _kept(form))


def _kept(form: FormData) -> KeptText | None:
    """Raises ApiError, or SoftPromptError for a text that cannot be kept."""
    texts, counts = form.getlist("text"), form.getlist("recall")
    for field, found in (("text", texts), ("recall", counts)):
        if len(found) > 1 or not all(isinstance(value, str) for value in found):
            raise invalid(field, "must be given once, as a text; with curl: -F 'text=<context.md' -F recall=2")
    if not texts:
        if counts:
            raise invalid("recall", "passages are recalled of a kept text alone; send 'text' too")
        return None
    count = str(counts[0]) if counts else str(DEFAULT_RECALL)
    if not (count.isascii() and count.isdigit() and len(count) <= 3):
        raise invalid("recall", f"must be a whole number from 0 to {MAX_RECALL}")
    try:
        kept = KeptText(text=clean_context(str(texts[0])), recall=int(count))
    except ContextTextError as error:
        raise invalid("text", str(error)) from None
    check_kept(kept)
    return kept


def _suffix(file: UploadFile) -> str:
    suffix = PurePosixPath(file.filename or "").suffix.lower()
    return suffix if suffix in SUFFIXES else ""
