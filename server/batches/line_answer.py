"""What is asked for one line of a batch, and how its answer is written down."""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable

import msgspec

CAUSES = {
    "cancelled": "the batch was cancelled before this request was answered",
    "expired": "the batch's completion_window ended before this request was answered",
}


class LineRequest(msgspec.Struct, frozen=True):
    """`id` is both the request's and that of its line in the output."""

    id: str
    endpoint: str
    owner: str
    body: bytes


class LineReply(msgspec.Struct, frozen=True):
    """What the route answers; `retry_after` set: nothing is known yet, and it may be asked again after so long."""

    status: int
    body: bytes
    retry_after: float | None = None

    @property
    def has_succeeded(self) -> bool:
        return 200 <= self.status < 300


Ask = Callable[[LineRequest], Awaitable[LineReply]]


class _Response(msgspec.Struct):
    status_code: int
    request_id: str
    body: msgspec.Raw


class _Error(msgspec.Struct):
    code: str
    message: str


class _OutputLine(msgspec.Struct):
    """A line of OpenAI's output and error files."""

    id: str
    custom_id: str
    response: _Response | None = None
    error: _Error | None = None


def new_request_id() -> str:
    return f"batch_req_{secrets.token_hex(12)}"


def answered(custom_id: str, request: LineRequest, reply: LineReply) -> bytes:
    response = _Response(reply.status, request.id, msgspec.Raw(reply.body))
    return msgspec.json.encode(_OutputLine(request.id, custom_id, response))


def unanswered(custom_id: str, code: str, message: str) -> bytes:
    """A request that no route has answered."""
    return msgspec.json.encode(_OutputLine(new_request_id(), custom_id, error=_Error(code, message)))
