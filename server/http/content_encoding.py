"""Compressed request bodies: gzip is read, up to the size that a body may have; anything else is refused."""

from __future__ import annotations

import zlib

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from softbatch.server.http.body_limit import MAX_JSON_BYTES, MIB
from softbatch.server.http.errors import ApiError, error_response

_PLAIN = ("", "identity")
_GZIP = ("gzip", "x-gzip")
_GZIP_WINDOW = 16 + zlib.MAX_WBITS


class ContentEncodingMiddleware:
    """Hands on a body as if it had never been compressed. Stands behind the limit for what arrives.

    `max_bytes` bounds what it grows to, so that a small body cannot fill the memory.
    """

    def __init__(self, app: ASGIApp, max_bytes: int = MAX_JSON_BYTES) -> None:
        self.app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        encoding = Headers(scope=scope).get("content-encoding", "").strip().lower() if scope["type"] == "http" else ""
        if encoding in _PLAIN:
            await self.app(scope, receive, send)
            return
        try:
            body = await self._inflated(encoding, receive)
        except ApiError as error:
            await error_response(error, scope["path"])(scope, receive, send)
            return
        if body is None:
            return
        scope = {**scope, "headers": list(scope["headers"])}
        headers = MutableHeaders(scope=scope)
        del headers["content-encoding"]
        headers["content-length"] = str(len(body))
        pending = [body]

        async def receive_inflated() -> Message:
            if pending:
                return {"type": "http.request", "body": pending.pop(), "more_body": False}
            return await receive()

        await self.app(scope, receive_inflated, send)

    async def _inflated(self, encoding: str, receive: Receive) -> bytes | None:
        """The whole body; None if the client has gone. Raises ApiError."""
        if encoding not in _GZIP:
            raise ApiError(
                415,
                "Content-Encoding: only gzip is read; send the body so, or not compressed",
                param="Content-Encoding",
                code="unsupported_encoding",
                headers={"Accept-Encoding": "gzip"},
            )
        inflater, body = zlib.decompressobj(_GZIP_WINDOW), bytearray()
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            more = message.get("more_body", False)
            try:
                body += inflater.decompress(message.get("body", b""), self._max_bytes + 1 - len(body))
            except zlib.error:
                raise _broken() from None
            if inflater.unused_data:  # more behind the end; several members in one body are not read
                raise _broken()
            if len(body) > self._max_bytes:
                limit = f"{self._max_bytes / MIB:g} MiB"
                raise ApiError(413, f"the body is larger than {limit} when it is no longer compressed")
        if not inflater.eof:
            raise _broken()
        return bytes(body)


def _broken() -> ApiError:
    return ApiError(400, "the body is not what its header 'Content-Encoding: gzip' says", code="invalid_encoding")
