"""What a full server refuses before it reads it."""

from __future__ import annotations

from collections.abc import Callable, Collection

from starlette.types import ASGIApp, Receive, Scope, Send

from softbatch.server.http.errors import as_api_error, error_response
from softbatch.server.request_failures import Failure


class FullHouseMiddleware:
    """Refuses requests to the given routes while `check_room` raises a Failure: their bodies are not looked at, so that
    those who are served do not pay for those who are not."""

    def __init__(self, app: ASGIApp, *, check_room: Callable[[], None], paths: Collection[str]) -> None:
        self.app = app
        self._check_room = check_room
        self._paths = frozenset(paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] in self._paths and scope["method"] == "POST":
            try:
                self._check_room()
            except Failure as failure:
                await error_response(as_api_error(failure), scope["path"])(scope, receive, send)
                return
        await self.app(scope, receive, send)
