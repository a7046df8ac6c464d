"""What somebody may have meant who asked for a route that does not exist."""

from __future__ import annotations

from collections.abc import Callable

# Of ollama's own API, which this is not.
_OLLAMA = {
    "/api/chat": "/v1/chat/completions",
    "/api/embed": "/v1/embeddings",
    "/api/embeddings": "/v1/embeddings",
    "/api/generate": "/v1/completions",
    "/api/tags": "/v1/models",
}


# No route of ours has more parts behind its version that a client's base URL would not hold.
_MAX_PARTS = 4


def meant(path: str, is_known: Callable[[str], bool]) -> str | None:
    """The path that does what was asked for by another server's name of it, or behind another base URL."""
    if path in _OLLAMA:
        return _OLLAMA[path]
    parts = path.rsplit("/", _MAX_PARTS)
    candidates = ("/".join(["/v1", *parts[at:]]) for at in range(1, len(parts)))
    return next((one for one in candidates if is_known(one)), None)
