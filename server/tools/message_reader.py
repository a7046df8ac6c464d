"""One pass over the text of an output, as it comes: reasoning, calls, and the text that answers."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from softbatch.server.journal import unique_names
from softbatch.server.tools.call_formats import CallFormat, CallReader
from softbatch.server.tools.message_parts import MessagePart, PartSink
from softbatch.server.tools.whole_calls import Signatures

# Behind so many marks without a call no more are looked for: each is read to the end of the text.
MAX_FALSE_MARKS = 32


@dataclass(frozen=True)
class ReasoningFormat:
    """The marks around what a model thinks, and which words of them may be special tokens."""

    opening: str
    closing: str
    tokens: tuple[str, ...]


class MessageReader:
    """Makes parts of text. However the text is cut, the parts joined are the same, and none of it is lost but marks
    and the blanks beside them.

    With `is_thinking` the prompt has opened the reasoning. No `calls`: none are looked for.
    """

    def __init__(
        self,
        calls: CallFormat | None,
        reasoning: ReasoningFormat | None,
        signatures: Signatures,
        *,
        is_thinking: bool = False,
        parallel: bool = True,
    ) -> None:
        self._calls = calls
        self._reasoning = reasoning
        self._signatures = signatures
        draw = unique_names()
        self._sink = PartSink(lambda: calls.new_id(draw()) if calls else "", parallel=parallel)
        self._marks = re.compile("|".join(map(re.escape, calls.marks))) if calls else None
        self._reader: CallReader | None = None
        self._held = ""
        self._passed = ""  # in front of what a reader reads; text again if that is no call
        self._num_false = 0
        self._num_before = 0
        self._has_thought = False
        self._is_fresh = False  # nothing has been shown since reasoning or calls
        self._step: Callable[[], bool] = self._thinking if is_thinking and reasoning else self._start

    @property
    def num_calls(self) -> int:
        return self._sink.num_calls

    def push(self, text: str) -> list[MessagePart]:
        self._held += text
        while self._step():
            pass
        return self._sink.take()

    def finish(self) -> list[MessagePart]:
        """No more text comes."""
        while self._reader is not None:
            self._end_of_calls(self._reader.finish())
            while self._step():
                pass
        if self._step == self._thinking:
            self._sink.reasoning(self._held)
        elif self._held.strip() or not self._is_fresh:
            self._sink.content(self._held)
        self._held = ""
        return self._sink.take()

    def _start(self) -> bool:
        """Only here may reasoning be opened, or calls stand without a mark."""
        bare = self._held.lstrip()
        opening = self._reasoning.opening if self._reasoning and not self._has_thought else ""
        if opening and bare.startswith(opening):
            self._held = bare[len(opening) :]
            self._step = self._thinking
            return True
        may_be_bare = self._calls is not None and self._calls.bare
        if (opening or may_be_bare or self._has_thought) and opening.startswith(bare):
            return False
        if self._calls is not None and self._calls.bare and bare.startswith(self._calls.bare):
            self._passed = "" if self._has_thought else self._held[: len(self._held) - len(bare)]
            self._held = bare
            self._read_calls(is_marked=False)
            return True
        if self._has_thought:
            self._held = bare
        self._step = self._text
        return True

    def _thinking(self) -> bool:
        assert self._reasoning is not None
        if not self._has_thought:
            self._held = self._held.lstrip()
            self._has_thought = bool(self._held)
        thought, closing, rest = self._held.partition(self._reasoning.closing)
        if closing:
            self._sink.reasoning(thought.rstrip())
            self._held = rest
            self._has_thought = self._is_fresh = True
            self._step = self._start
            return True
        certain = len(thought[: len(thought) - overlap(thought, self._reasoning.closing)].rstrip())
        self._sink.reasoning(thought[:certain])
        self._held = thought[certain:]
        return False

    def _text(self) -> bool:
        found = self._marks.search(self._held) if self._marks and self._num_false < MAX_FALSE_MARKS else None
        if found is not None:
            before = self._held[: found.start()]
            self._show(before.rstrip())
            self._passed = self._held[len(before.rstrip()) : found.end()]
            self._held = self._held[found.end() :]
            self._read_calls(is_marked=True)
            return True
        held_back = 0
        if self._calls is not None and self._num_false < MAX_FALSE_MARKS:
            held_back = max(overlap(self._held, mark) for mark in self._calls.marks)
        certain = len(self._held[: len(self._held) - held_back].rstrip()) if self._calls else len(self._held)
        self._show(self._held[:certain])
        self._held = self._held[certain:]
        return False

    def _show(self, text: str) -> None:
        """Behind calls the blanks in front of a message's first text are none of it."""
        if self._sink.num_calls and not self._sink.has_content:
            text = text.lstrip()
        if text:
            self._is_fresh = False
        self._sink.content(text)

    def _read_calls(self, *, is_marked: bool) -> None:
        assert self._calls is not None
        self._reader = self._calls.new_reader(self._sink, self._signatures, is_marked)
        self._num_before = self._sink.num_read
        self._step = self._in_calls

    def _in_calls(self) -> bool:
        assert self._reader is not None
        text, self._held = self._held, ""
        rest = self._reader.read(text)
        if rest is None:
            return False
        self._end_of_calls(rest)
        return True

    def _end_of_calls(self, rest: str) -> None:
        if self._sink.num_read == self._num_before:
            self._num_false += 1
            self._show(self._passed)
        else:
            self._is_fresh = True
        self._reader = None
        self._passed = ""
        self._held = rest
        self._step = self._text


def overlap(text: str, mark: str) -> int:
    """Length of the longest end of the text that is a proper start of the mark."""
    for length in range(min(len(mark) - 1, len(text)), 0, -1):
        if text.endswith(mark[:length]):
            return length
    return 0
