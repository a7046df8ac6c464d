"""What a compression worker tells the server: one JSON object a line."""

from __future__ import annotations

from typing import Any

import msgspec


class ProgressMessage(msgspec.Struct, frozen=True, tag="progress", tag_field="type"):
    phase: str
    done: int
    total: int
    loss: float | None = None
    seconds_left: float | None = None
    elapsed: float | None = None
    expected: float | None = None
    note: str | None = None


class PreviewMessage(msgspec.Struct, frozen=True, tag="preview", tag_field="type"):
    """The preview's file lies in the directory; a run that goes on says so again."""


class DoneMessage(msgspec.Struct, frozen=True, tag="done", tag_field="type"):
    """The soft prompt's file lies in the directory; `fidelity` is the report's summary."""

    fidelity: dict[str, Any]


class FailedMessage(msgspec.Struct, frozen=True, tag="failed", tag_field="type"):
    """It cannot be done; `message` may be shown to the client."""

    code: str
    message: str
    param: str | None = None


WorkerMessage = ProgressMessage | PreviewMessage | DoneMessage | FailedMessage
