"""A running softbatch server, as the commands speak to it: with what Python brings, so that they start at once."""

from __future__ import annotations

import contextlib
import http.client
import json
import secrets
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from softbatch.prompt_store.stores.kept_text import KeptText
from softbatch.server.cli.settings_flags import UsageError

TIMEOUT_SECONDS = 60.0
# Of a stream: a request may wait in the queue. The server sends a comment every few seconds meanwhile.
STREAM_TIMEOUT_SECONDS = 60.0
CHUNK = 1 << 20


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

    def text(self, path: str) -> str:
        """The reply to a GET, as it is."""
        with self._open("GET", path, None, {}, TIMEOUT_SECONDS) as reply:
            content: bytes = reply.read()
        return content.decode()

    def stream(self, path: str, body: object) -> Iterator[dict[str, Any]]:
        """The server-sent events of a reply, as they come; whoever stops reading ends the request."""
        headers = {"Content-Type": "application/json"}
        with self._open("POST", path, json.dumps(body).encode(), headers, STREAM_TIMEOUT_SECONDS) as reply:
            for line in reply:
                if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                    continue
                event: dict[str, Any] = json.loads(line[len(b"data: ") :])
                if (problem := _message_of(event)) is not None:
                    raise UsageError(f"the server says: {problem}")
                yield event

    @contextlib.contextmanager
    def _open(
        self, method: str, path: str, data: bytes | None, headers: Mapping[str, str], timeout: float
    ) -> Iterator[Any]:
        """A successful reply, still unread."""
        request = urllib.request.Request(
            self._url + path, data=data, headers={**self._headers, **headers}, method=method
        )
        try:
            with urllib.request.urlopen(request, timeout=timeout) as reply:
                yield reply
        except urllib.error.HTTPError as error:
            try:
                problem = _message_of(json.loads(error.read()))
            except ValueError:
                problem = None
            raise UsageError(f"the server says: {problem or f'status {error.code}'}") from None
        except (OSError, http.client.HTTPException) as error:
            raise self._no_answer(error) from error

    def _no_answer(self, error: Exception) -> UsageError:
        reason = getattr(error, "reason", error)
        return UsageError(f"--server {self._url}: no answer ({reason}); is the server running?")

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
            raise self._no_answer(error) from error
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
