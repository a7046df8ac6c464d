"""Requests that the end of the server cuts off."""

from __future__ import annotations

import asyncio
import contextlib

from starlette.types import ASGIApp, Receive, Scope, Send

from softbatch.server.http.errors import error_response, unavailable


class CutOffMiddleware:
    """A request is cancelled only when the server ends; it is then answered like any other error, if it is not yet."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self.app(scope, receive, send)
        except asyncio.CancelledError:
            if scope["type"] != "http":
                raise
            with contextlib.suppress(RuntimeError):  # of uvicorn, when the answer has begun
                error = unavailable("the server was stopped before this request was finished", code="draining")
                await error_response(error)(scope, receive, send)
