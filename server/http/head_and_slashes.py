"""Requests as people send them: HEAD where there is GET, a slash too many in the path, or Azure's path."""

from __future__ import annotations

import asyncio
import re

from starlette.types import ASGIApp, Message, Receive, Scope, Send

_SLASHES = re.compile(r"//+")
_AZURE = re.compile(
    r"/openai/(?:deployments/([^/]+)|v1)(/(?:chat/completions|completions|embeddings|models|responses))"
)
# Where a scope holds the name of a deployment, which is a model's.
DEPLOYMENT = "softbatch.deployment"


def canonical(path: str) -> tuple[str, str]:
    """The path of ours, and the deployment that the one of Azure's names; empty: none."""
    path = _SLASHES.sub("/", path).rstrip("/") or "/"
    azure = _AZURE.fullmatch(path)
    return (path, "") if azure is None else (f"/v1{azure[2]}", azure[1] or "")


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
        path, deployment = canonical(scope["path"])
        if path != scope["path"]:
            scope = {**scope, "path": path, "raw_path": path.encode(), DEPLOYMENT: deployment}
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
