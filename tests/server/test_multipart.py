"""A name on its way in: looked at before the files behind it, and never while the event loop waits."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
from starlette.requests import Request

from softbatch.prompt_store.manifest import SoftPromptError
from softbatch.prompt_store.stores.store import NameTaken
from softbatch.server.http.errors import ApiError
from softbatch.server.http.multipart import read_upload
from softbatch.server.services import Services

BOUNDARY = b"--x\r\n"
FIELD = b'Content-Disposition: form-data; name="%b"\r\n\r\n%b\r\n'
FILE = b'Content-Disposition: form-data; name="file"; filename="a.safetensors"\r\n\r\n'


class Upload:
    """One that comes in many parts; `received` counts those that were asked for."""

    def __init__(self, name: bytes) -> None:
        begin = BOUNDARY + FIELD % (b"name", name) + BOUNDARY + FILE
        self._parts: Iterator[bytes] = iter([begin, *[b"0" * 1000] * 8, b"\r\n--x--\r\n"])
        self.received = 0

    def request(self) -> Request:
        headers = [(b"content-type", b"multipart/form-data; boundary=x")]
        return Request({"type": "http", "method": "POST", "path": "/", "headers": headers}, self._receive)

    async def _receive(self) -> dict[str, Any]:
        part = next(self._parts, None)
        self.received += part is not None
        return {"type": "http.request", "body": part or b"", "more_body": part is not None}


class Names:
    """The part of a store that is asked; it notes by which threads."""

    def __init__(self, taken: str = "") -> None:
        self._taken = taken
        self.asked: list[threading.Thread] = []

    def check_free(self, name: str) -> None:
        self.asked.append(threading.current_thread())
        if name == self._taken:
            raise NameTaken(name)


async def receive(upload: Upload, names: Names) -> str:
    services = SimpleNamespace(model_name="base", settings=SimpleNamespace(model="path/of/base"), store=names)
    async with read_upload(upload.request(), cast(Services, services)) as form:
        assert [file.size for file in form.files] == [8000]
        return form.name


def test_a_store_is_asked_in_a_thread() -> None:
    names = Names()
    assert asyncio.run(receive(Upload(b"manual"), names)) == "manual"
    assert len(names.asked) == 1
    assert names.asked[0] is not threading.current_thread()


@pytest.mark.parametrize(
    ("name", "error", "code"),
    [(b"manual", SoftPromptError, "name_taken"), (b"base", ApiError, "name_taken"), (b"a b", SoftPromptError, None)],
)
def test_a_name_that_cannot_be_is_told_before_the_files(
    name: bytes, error: type[SoftPromptError | ApiError], code: str | None
) -> None:
    upload = Upload(name)
    with pytest.raises((SoftPromptError, ApiError)) as caught:
        asyncio.run(receive(upload, Names("manual")))
    assert isinstance(caught.value, error)
    assert caught.value.code == (code or "invalid_name")
    assert upload.received == 1
