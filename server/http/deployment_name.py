"""The deployment that Azure's path names is the model, where the body names none."""

from __future__ import annotations

import json

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from softbatch.server.http.errors import ApiError, error_response, invalid
from softbatch.server.http.head_and_slashes import DEPLOYMENT
from softbatch.server.request_failures import shown
from softbatch.server.schemas.models import PLACEHOLDERS


class DeploymentNameMiddleware:
    """Routes see one name only. Stands behind whatever bounds bodies and opens compressed ones."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        name = scope.get(DEPLOYMENT)
        if not name or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        body = bytearray()
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
        try:
            pending = [_with_model(bytes(body), name)]
        except ApiError as error:
            await error_response(error, scope["path"])(scope, receive, send)
            return
        scope = {**scope, "headers": list(scope["headers"])}
        MutableHeaders(scope=scope)["content-length"] = str(len(pending[0]))

        async def receive_named() -> Message:
            if pending:
                return {"type": "http.request", "body": pending.pop(), "more_body": False}
            return await receive()

        await self.app(scope, receive_named, send)


def _with_model(body: bytes, name: str) -> bytes:
    """As it is where it cannot be read, as routes read: they say what is wrong with it. Raises ApiError 400."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        return body
    if not isinstance(fields, dict):
        return body
    model = fields.get("model")
    if model is None or (isinstance(model, str) and model in PLACEHOLDERS):
        return json.dumps({**fields, "model": name}).encode()
    if isinstance(model, str) and model != name:
        what = f"the body says {shown(model)}, and the path {shown(name)}; name the same one, or none in the body"
        raise invalid("model", what)
    return body
