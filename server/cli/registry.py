"""Where a new soft prompt is registered: a store on this machine, or a running server."""

from __future__ import annotations

import hashlib
import http.client
import json
import secrets
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from softbatch.prompt_store.manifest import ModelSpec
from softbatch.prompt_store.names import is_name
from softbatch.prompt_store.stores.directory import NameTaken, PromptStore
from softbatch.prompt_store.stores.kept_text import KeptText
from softbatch.server.cli.settings_flags import UsageError

if TYPE_CHECKING:
    from softbatch.server.compressions.result import Finished

TIMEOUT_SECONDS = 60.0
CHUNK = 1 << 20


class Registry(Protocol):
    """Raises UsageError or SoftPromptError."""

    def max_bytes(self) -> int:
        """Of a soft prompt's file."""
        ...

    def check_free(self, name: str) -> None: ...

    def check_model(self, name: str, spec: ModelSpec) -> None: ...

    def add(self, name: str, finished: Finished) -> None: ...


class LocalRegistry:
    def __init__(self, store: PromptStore) -> None:
        self._store = store

    def max_bytes(self) -> int:
        return self._store.max_bytes

    def check_free(self, name: str) -> None:
        self._store.check_free(name)

    def check_model(self, name: str, spec: ModelSpec) -> None:
        """A store takes the soft prompts of any model."""

    def add(self, name: str, finished: Finished) -> None:
        from softbatch.server.compressions.result import register

        register(self._store, name, finished)


class RemoteRegistry:
    def __init__(self, client: ServerClient) -> None:
        self._client = client

    @cached_property
    def _info(self) -> dict[str, Any]:
        return self._client.call("GET", "/info")[1]

    def max_bytes(self) -> int:
        limit = self._info.get("max_soft_prompt_bytes")
        return limit if isinstance(limit, int) else sys.maxsize  # an older server does not say

    def check_free(self, name: str) -> None:
        if not is_name(name):
            raise UsageError("--name: use 1 to 128 of A-Z a-z 0-9 . _ - and begin with a letter or digit")
        if self._sha256(name) is not None:
            raise NameTaken(name)
        if self._info.get("model_id") == name:
            raise UsageError(_is_the_model(name))
        self._client.call("GET", "/v1/compressions")  # what registers a soft prompt may do this too

    def check_model(self, name: str, spec: ModelSpec) -> None:
        info = self._info
        if info.get("model_fingerprint") != spec.fingerprint:
            raise UsageError(
                f"--model: the server runs {info.get('model_id')}, which is another model than {spec.name}; "
                "compress with the model that will serve the soft prompt"
            )

    def add(self, name: str, finished: Finished) -> None:
        if self._sha256(name) != hashlib.sha256(finished.prompt.read_bytes()).hexdigest():
            self._client.upload("/v1/soft_prompts", name, finished.prompt, finished.kept)

    def _sha256(self, name: str) -> str | None:
        status, found = self._client.call("GET", f"/v1/soft_prompts/{name}", expected=(200, 404))
        return str(found["sha256"]) if status == 200 else None


def _is_the_model(name: str) -> str:
    return f"--name: {name} is the model's own name; choose another one"


class ServerClient:
    """A running softbatch server over HTTP. Raises UsageError with the server's own words."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UsageError(f"--server {url}: give an address such as http://127.0.0.1:8000")
        self._url = url.rstrip("/")
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}

    def call(
        self, method: str, path: str, body: object = None, expected: tuple[int, ...] = (200,)
    ) -> tuple[int, dict[str, Any]]:
        """(status, JSON reply) of a request whose status is one of `expected`."""
        data = None if body is None else json.dumps(body).encode()
        headers = {} if data is None else {"Content-Type": "application/json"}
        return self._send(method, path, data, headers, expected)

    def upload(self, path: str, name: str, file: Path, kept: KeptText | None = None) -> None:
        """A multipart form with the fields `name`, `file` and, if a text is kept, `text` and `recall`. The file is
        not held in memory."""
        boundary = secrets.token_hex(16)
        fields = {"name": name} | ({} if kept is None else {"text": kept.text, "recall": str(kept.recall)})
        head = "".join(
            f'--{boundary}\r\nContent-Disposition: form-data; name="{field}"\r\n\r\n{value}\r\n'
            for field, value in fields.items()
        ).encode()
        head += (
            f"--{boundary}\r\n"
            f'Content-Disposition: form-data; name="file"; filename="{name}.safetensors"\r\n'
            "Content-Type: application/octet-stream\r\n\r\n"
        ).encode()
        tail = f"\r\n--{boundary}--\r\n".encode()

        def parts() -> Iterator[bytes]:
            yield head
            with file.open("rb") as source:
                while chunk := source.read(CHUNK):
                    yield chunk
            yield tail

        headers = {
            "Content-Type": f"multipart/form-data; boundary={boundary}",
            "Content-Length": str(len(head) + file.stat().st_size + len(tail)),
        }
        self._send("POST", path, parts(), headers, (201,))

    def _send(
        self,
        method: str,
        path: str,
        data: bytes | Iterator[bytes] | None,
        headers: Mapping[str, str],
        expected: tuple[int, ...],
    ) -> tuple[int, dict[str, Any]]:
        request = urllib.request.Request(
            self._url + path, data=data, headers={**self._headers, **headers}, method=method
        )
        try:
            try:
                with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as reply:
                    status, content = reply.status, reply.read()
            except urllib.error.HTTPError as error:
                status, content = error.code, error.read()
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise UsageError(f"--server {self._url}: no answer ({reason}); is the server running?") from error
        try:
            parsed = json.loads(content)
        except ValueError:
            raise UsageError(f"--server {self._url}: this is no softbatch server (status {status})") from None
        if status not in expected:
            raise UsageError(f"the server says: {_message_of(parsed) or f'status {status}'}")
        return status, parsed


def _message_of(reply: object) -> str | None:
    """Of an error as this server, or a proxy before it, says it."""
    error = reply.get("error") if isinstance(reply, dict) else None
    message = error.get("message") if isinstance(error, dict) else error
    return message if isinstance(message, str) else None
