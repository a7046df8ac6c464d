"""API keys: every route but the health checks and the documentation wants one, once any is set."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from softbatch.server.http.errors import ANTHROPIC_PATHS, ApiError, error_response
from softbatch.server.key_weights import owner_of
from softbatch.server.observability.request_record import current


@dataclass(frozen=True)
class _Key:
    digest: bytes
    owner: str
    is_admin: bool


class AuthMiddleware:
    """Refuses requests without a known key; lets everything through when no key is set.

    Decides on `scope["path"]`, the very path that routing uses, never on a URL put together from headers. With admin
    keys, the other keys may use what is there, and change nothing that all share.
    """

    def __init__(self, app: ASGIApp, api_keys: Sequence[str], admin_keys: Sequence[str] = ()) -> None:
        self.app = app
        # Digests have one length, so comparing them tells nothing about the keys' lengths.
        keys = dict.fromkeys((*api_keys, *admin_keys))
        self._keys = tuple(
            _Key(
                hashlib.sha256(key.encode()).digest(),
                owner_of(key) if len(keys) > 1 else "",
                key in admin_keys or not admin_keys,
            )
            for key in keys
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not self._keys or scope["type"] == "lifespan" or _is_public(scope):
            await self.app(scope, receive, send)
            return
        key = self._known(scope)
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if key is None:
            header = "x-api-key: <key>" if scope["path"] in ANTHROPIC_PATHS else "Authorization: Bearer <key>"
            error = ApiError(
                401,
                f"a valid API key is needed: send the header '{header}'",
                headers={"WWW-Authenticate": "Bearer"},
            )
        elif not key.is_admin and _needs_admin(scope):
            error = ApiError(403, "this takes one of the server's admin keys", code="admin_key_needed")
        else:
            record = current()
            record.owner, record.is_admin = key.owner, key.is_admin
            await self.app(scope, receive, send)
            return
        await error_response(error, scope["path"])(scope, receive, send)

    def _known(self, scope: Scope) -> _Key | None:
        headers = Headers(scope=scope)
        scheme, _, token = headers.get("authorization", "").partition(" ")
        # As Anthropic's and Azure's clients send it, some beside a bearer token that is meant for somebody else.
        # Elsewhere a gateway in between may have put its own there.
        bearer = [token.strip()] if scheme.lower() == "bearer" else []
        others = [headers.get(name, "").strip() for name in ("x-api-key", "api-key")]
        given = [*others, *bearer] if scope["path"] in ANTHROPIC_PATHS else [*bearer, *others]
        return next((key for key in map(self._key_of, given) if key is not None), None)

    def _key_of(self, given: str) -> _Key | None:
        digest = hashlib.sha256(given.encode("latin-1")).digest()
        found = None
        for key in self._keys:
            if hmac.compare_digest(digest, key.digest):
                found = key
        return found


def _needs_admin(scope: Scope) -> bool:
    """What changes, or shows the contexts behind, the soft prompts that all keys share."""
    path: str = scope["path"]
    if path == "/v1/compressions" or path.startswith("/v1/compressions/"):
        return True
    is_store = path == "/v1/soft_prompts" or path.startswith("/v1/soft_prompts/")
    return is_store and scope.get("method") not in ("GET", "HEAD", "OPTIONS")


def is_probe(path: str) -> bool:
    """Whether the path is one that probes ask, every few seconds and without a key."""
    return path in ("/health", "/ping") or path.startswith("/health/")


def _is_public(scope: Scope) -> bool:
    """Probes carry no key; nor does a browser that opens the documentation or the console, which are the same for every
    server: what the console shows it asks for with a key."""
    path: str = scope["path"]
    is_page = path in ("/docs", "/openapi.json", "/console") or path.startswith(("/docs/assets/", "/console/assets/"))
    return is_probe(path) or ((is_page or path == "/") and scope.get("method") in ("GET", "HEAD"))
