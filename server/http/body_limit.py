"""The size of a request body, enforced while it streams in."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from softbatch.server.http.errors import ApiError, error_response

MIB = 1 << 20
MAX_JSON_BYTES = 8 * MIB
# Boundaries, part headers and an adapter_config.json beside the soft prompt itself.
MULTIPART_OVERHEAD_BYTES = MIB
SOFT_PROMPTS_PATH = "/v1/soft_prompts"
FILES_PATH = "/v1/files"


class BodyLimitMiddleware:
    """Answers 413 as soon as a body is, or says it will be, larger than its route takes.

    Counts what arrives, so that chunked bodies and wrong Content-Lengths are held to the limit too. Whatever
    the app makes of its broken-off body, the client gets the 413.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        max_upload_bytes: int,
        max_file_bytes: int = 0,
        max_json_bytes: int = MAX_JSON_BYTES,
    ) -> None:
        self.app = app
        self._max_upload_bytes = {
            SOFT_PROMPTS_PATH: max_upload_bytes + MULTIPART_OVERHEAD_BYTES,
            FILES_PATH: max_file_bytes + MULTIPART_OVERHEAD_BYTES,
        }
        self._max_json_bytes = max_json_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        limit = self._max_upload_bytes.get(scope["path"].rstrip("/"), self._max_json_bytes)
        announced = Headers(scope=scope).get("content-length", "0")
        if announced.isdecimal() and int(announced[:20]) > limit:
            await error_response(_too_large(limit), scope["path"])(scope, receive, send)
            return
        received = 0
        exceeded = answered = False

        async def counting_receive() -> Message:
            nonlocal received, exceeded
            message = await receive()
            if message["type"] == "http.request":
                received += len(message.get("body", b""))
                if received > limit:
                    exceeded = True
                    raise HTTPException(413)
            return message

        async def replacing_send(message: Message) -> None:
            nonlocal answered
            if not exceeded or answered:
                # A reply that began before the body was too large runs to its end.
                answered = answered or message["type"] == "http.response.start"
                await send(message)

        try:
            await self.app(scope, counting_receive, replacing_send)
        except Exception:
            if not exceeded or answered:
                raise
        if exceeded and not answered:
            await error_response(_too_large(limit), scope["path"])(scope, receive, send)


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"the body is larger than the {limit / MIB:g} MiB that this route takes")
