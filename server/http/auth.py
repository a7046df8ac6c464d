"""API keys: every route but the health checks wants one, once any is set."""

from __future__ import annotations

import hashlib
import hmac

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from softbatch.server.http.errors import ApiError, error_response


class AuthMiddleware:
    """Refuses requests without a known bearer token; lets everything through when no key is set.

    Decides on `scope["path"]`, the very path that routing uses, never on a URL put together from headers.
    """

    def __init__(self, app: ASGIApp, api_keys: tuple[str, ...]) -> None:
        self.app = app
        # Digests have one length, so comparing them tells nothing about the keys' lengths.
        self._digests = tuple(hashlib.sha256(key.encode()).digest() for key in api_keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        guarded = self._digests and scope["type"] != "lifespan" and not is_public(scope["path"])
        if not guarded or self._is_known(Headers(scope=scope).get("authorization", "")):
            await self.app(scope, receive, send)
            return
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        error = ApiError(
            401,
            "a valid API key is needed: send the header 'Authorization: Bearer <key>'",
            headers={"WWW-Authenticate": "Bearer"},
        )
        await error_response(error, scope["path"])(scope, receive, send)

    def _is_known(self, authorization: str) -> bool:
        scheme, _, token = authorization.partition(" ")
        digest = hashlib.sha256(token.strip().encode("latin-1")).digest()
        known = False
        for candidate in self._digests:
            known |= hmac.compare_digest(digest, candidate)
        return known and scheme.lower() == "bearer"


def is_public(path: str) -> bool:
    """Probes carry no key."""
    return path == "/health" or path.startswith("/health/")
