"""X-Request-Id: taken from the client or made up, sent back with every reply, and written to the log."""

from __future__ import annotations

import logging
import re
import secrets
import time

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from softbatch.server.http.errors import error_response, internal_error
from softbatch.server.request_failures import shown

logger = logging.getLogger(__name__)
# Letters that neither break a line of a log nor a header.
_VALID = re.compile(r"[A-Za-z0-9._:@/+=~-]{1,128}")


class RequestIdMiddleware:
    """Owns a request's id. One that a client sends with other characters, or longer, is replaced by a new one.

    A request that brings an id is logged when its reply begins; one that fails in the server is always.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        sent = Headers(scope=scope).get("x-request-id", "")
        is_sent = _VALID.fullmatch(sent) is not None
        request_id = sent if is_sent else secrets.token_hex(16)
        header = (b"x-request-id", request_id.encode())
        since, began = time.monotonic(), False

        async def send_with_id(message: Message) -> None:
            nonlocal began
            if message["type"] == "http.response.start":
                began = True
                message = {**message, "headers": [*message.get("headers", []), header]}
                if is_sent or message["status"] >= 500:
                    where = f"{scope['method']} {shown(scope['path'])}"
                    logger.info("request %s: %s %d after %.3f s", request_id, where, message["status"], _since(since))
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except Exception as error:
            if began:
                raise
            # Here rather than at the very outside, so that this reply too has its id.
            failure = internal_error(error, f"{scope['method']} {scope['path'][:200]!r}", request_id)
            await error_response(failure, scope["path"])(scope, receive, send_with_id)


def _since(then: float) -> float:
    return time.monotonic() - then
