"""Requests as people send them: HEAD where there is GET, a slash too many in the path, or Azure's path."""

from __future__ import annotations

import asyncio
import re

from starlette.types import ASGIApp, Message, Receive, Scope, Send

_SLASHES = re.compile(r"//+")
# A deployment has the model's name, which stands in the body too.
_AZURE = re.compile(r"/openai/(?:deployments/[^/]+|v1)(/(?:chat/completions|completions|embeddings|models|responses))")


class HeadAndSlashesMiddleware:
    """Everything behind it sees the path that was meant, and answers HEAD as GET; the body of that answer is dropped.

    Stands before whatever decides by the path.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = _SLASHES.sub("/", scope["path"]).rstrip("/") or "/"
        if azure := _AZURE.fullmatch(path):
            path = f"/v1{azure[1]}"
        if path != scope["path"]:
            scope = {**scope, "path": path, "raw_path": path.encode()}
        if scope["method"] != "HEAD":
            await self.app(scope, receive, send)
            return
        answered = False

        async def send_head(message: Message) -> None:
            nonlocal answered
            if message["type"] == "http.response.start":
                await send(message)
                await send({"type": "http.response.body", "body": b"", "more_body": False})
                answered = True
            # A stream must find out that nobody is there, also one that never waits.
            await asyncio.sleep(0)

        async def receive_none() -> Message:
            # A stream would go on for nobody.
            return {"type": "http.disconnect"} if answered else await receive()

        await self.app({**scope, "method": "GET"}, receive_none, send_head)
