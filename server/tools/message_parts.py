"""What an assistant's message is made of, piece by piece: its text, its reasoning, and calls of tools."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import msgspec


class ContentPart(msgspec.Struct, frozen=True, gc=False):
    """More of the text that answers."""

    text: str


class ReasoningPart(msgspec.Struct, frozen=True, gc=False):
    """More of what the model thinks before it answers."""

    text: str


class CallStart(msgspec.Struct, frozen=True, gc=False):
    """A call begins; its arguments follow. `index` counts the calls of a message from 0."""

    index: int
    id: str
    name: str


class CallArguments(msgspec.Struct, frozen=True, gc=False):
    """More of a call's arguments, which together are JSON as far as the model has written JSON."""

    index: int
    text: str


MessagePart = ContentPart | ReasoningPart | CallStart | CallArguments


@dataclass
class ReadCall:
    """A whole call; `arguments` is JSON text."""

    id: str
    name: str
    arguments: str = ""


@dataclass
class ReadMessage:
    """All parts of a message, joined."""

    content: str = ""
    reasoning: str = ""
    calls: list[ReadCall] = field(default_factory=list)

    @classmethod
    def of(cls, parts: Iterable[MessagePart]) -> ReadMessage:
        content, reasoning, calls = [], [], list[ReadCall]()
        arguments: list[list[str]] = []
        for part in parts:
            match part:
                case ContentPart(text):
                    content.append(text)
                case ReasoningPart(text):
                    reasoning.append(text)
                case CallStart(_, call_id, name):
                    calls.append(ReadCall(call_id, name))
                    arguments.append([])
                case CallArguments(index, text):
                    arguments[index].append(text)
        for call, pieces in zip(calls, arguments, strict=True):
            call.arguments = "".join(pieces)
        return cls("".join(content), "".join(reasoning), calls)


class PartSink:
    """Takes what readers find and makes parts of it; owns the numbers and ids of calls. Of calls behind the first
    nothing is kept unless they may be `parallel`."""

    def __init__(self, new_id: Callable[[], str], *, parallel: bool) -> None:
        self._new_id = new_id
        self._parallel = parallel
        self._parts: list[MessagePart] = []
        self._is_dropped = False
        self.num_read = 0  # calls, those of which nothing is kept too
        self.num_calls = 0
        self.has_content = False

    def content(self, text: str) -> None:
        if text:
            self.has_content = True
            self._parts.append(ContentPart(text))

    def reasoning(self, text: str) -> None:
        if text:
            self._parts.append(ReasoningPart(text))

    def begin(self, name: str) -> None:
        self.num_read += 1
        self._is_dropped = self.num_calls > 0 and not self._parallel
        if not self._is_dropped:
            self._parts.append(CallStart(self.num_calls, self._new_id(), name))
            self.num_calls += 1

    def arguments(self, text: str) -> None:
        if text and not self._is_dropped:
            self._parts.append(CallArguments(self.num_calls - 1, text))

    def take(self) -> list[MessagePart]:
        parts, self._parts = self._parts, []
        return parts
