"""What somebody may have meant who asked for a route that does not exist."""

from __future__ import annotations

from collections.abc import Iterable

# Of ollama's own API, which this is not.
_OLLAMA = {
    "/api/chat": "/v1/chat/completions",
    "/api/embed": "/v1/embeddings",
    "/api/embeddings": "/v1/embeddings",
    "/api/generate": "/v1/completions",
    "/api/tags": "/v1/models",
}


def meant(path: str, known: Iterable[str]) -> str | None:
    """The one of the `known` paths that does what was asked for: another server's, or one with another base URL."""
    if path in _OLLAMA:
        return _OLLAMA[path]
    ends = [one for one in known if one.startswith("/v1/") and path.endswith(one.removeprefix("/v1"))]
    return max(ends, key=len, default=None)
