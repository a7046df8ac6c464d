"""Memory for the bodies of requests, which an ingress keeps until they are answered."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from softbatch.server.http.errors import ApiError

MOST_BODY_BYTES = 1 << 30


class NoRoom(ApiError):
    """The bodies of other requests take all there is."""

    def __init__(self) -> None:
        message = "too many large bodies are being sent at once; try again later"
        super().__init__(503, message, headers={"Retry-After": "5"})


class BodyRoom:
    """Owns the count of what all bodies of one ingress hold."""

    def __init__(self, most: int = MOST_BODY_BYTES) -> None:
        self._most = most
        self._num_held = 0

    @contextlib.contextmanager
    def held(self) -> Iterator[HeldBody]:
        """One body; its room is given back behind the block."""
        body = HeldBody(self)
        try:
            yield body
        finally:
            self._num_held -= body.size

    def _take(self, size: int, already: int) -> None:
        """`already` is what the same body has: alone, it may be as large as it likes. Raises NoRoom."""
        if self._num_held > already and self._num_held + size > self._most:
            raise NoRoom
        self._num_held += size


class HeldBody:
    def __init__(self, room: BodyRoom) -> None:
        self._room = room
        self.size = 0

    def grow(self, size: int) -> None:
        """Raises NoRoom."""
        self._room._take(size, self.size)
        self.size += size
