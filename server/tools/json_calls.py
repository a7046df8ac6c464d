"""Calls in JSON behind a mark: one, a list, or several one after another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import regex

from softbatch.server.tools.json_call import JsonCall
from softbatch.server.tools.message_parts import PartSink

# `name[ARGS]{`, or `name{`; an id may stand between them, on which nothing depends. Nothing is given back, and
# blanks are bounded: two runs of them in a row could be parted in as many ways as there are blanks.
_NAMED = regex.compile(r"([\w.\-]{1,256}+)\s{0,256}+(?:\[CALL_ID\][^\[{]{0,256}+)?(?:\[ARGS\])?\s{0,256}+\{")


@dataclass(frozen=True)
class JsonLayout:
    """How calls stand behind a mark. `separators` may part them if they are no list, `end_mark` may close them, and
    with `named` each may be a name in front of its arguments."""

    end_mark: str = ""
    separators: str = ""
    named: bool = False


class JsonCalls:
    """Reads the calls behind one mark. What is not of a call is given back, with all that was read since the last."""

    def __init__(self, layout: JsonLayout, sink: PartSink, names: frozenset[str] | None) -> None:
        self._layout = layout
        self._sink = sink
        self._names = names
        self._held = ""
        self._passed = ""  # of what was read since the last call
        self._call: JsonCall | None = None
        self._is_announced = False
        self._in_list = False
        self._num_read = 0
        self._step: Callable[[], str | None] = self._before_call
        self._waits = False

    def read(self, text: str) -> str | None:
        """None while calls may follow; else what is behind them."""
        self._held += text
        self._waits = False
        while not self._waits:
            rest = self._step()
            if rest is not None:
                return rest
        return None

    def finish(self) -> str:
        """No more text comes: what is left of it."""
        if self._call is not None:
            self._call.finish()
            rest = self._behind_object()
            if rest is not None:
                return rest
        rest = self._give_back()
        # Cut off within the mark that would have closed it.
        return "" if self._num_read and self._layout.end_mark.startswith(rest.strip()) else rest

    def _wait(self) -> str | None:
        self._waits = True
        return None

    def _give_back(self) -> str:
        return self._passed + self._held

    def _pass(self, length: int) -> None:
        self._passed += self._held[:length]
        self._held = self._held[length:]

    def _skip_blanks(self) -> str:
        """The next character; empty if it is not there yet."""
        self._pass(len(self._held) - len(self._held.lstrip()))
        return self._held[:1]

    def _before_call(self) -> str | None:
        char = self._skip_blanks()
        if not char:
            return self._wait()
        if char == "[" and not self._in_list and not self._num_read:
            self._in_list = True
            self._pass(1)
            return None
        if char == "]" and self._in_list and not self._num_read:
            self._pass(1)
            return self._give_back()
        if char == "{":
            self._begin(JsonCall(self._layout.end_mark, names=self._names))
            return None
        if self._layout.named and not self._in_list:
            found = _NAMED.match(self._held, partial=True)
            if found is not None and found.partial:
                return self._wait()
            if found is not None:
                self._pass(found.end() - 1)
                self._begin(JsonCall(self._layout.end_mark, name=found[1]))
                return None
        return self._give_back()

    def _begin(self, call: JsonCall) -> None:
        self._call = call
        self._is_announced = False
        self._step = self._in_object

    def _in_object(self) -> str | None:
        assert self._call is not None
        text, self._held = self._held, ""
        self._call.push(text)
        if self._call.has_ended:
            return self._behind_object()
        self._tell()
        return self._wait()

    def _tell(self) -> None:
        assert self._call is not None
        if self._call.has_begun and not self._is_announced:
            self._is_announced = True
            self._passed = ""
            self._sink.begin(self._call.name or "")
        if self._is_announced:
            self._sink.arguments(self._call.take_arguments())

    def _behind_object(self) -> str | None:
        assert self._call is not None
        self._tell()
        self._held = self._call.rest
        has_failed, self._call = self._call.has_failed, None
        if has_failed:
            return self._give_back()
        self._num_read += 1
        self._step = self._behind_call
        return None

    def _behind_call(self) -> str | None:
        char = self._skip_blanks()
        if not char:
            return self._wait()
        if char == "," if self._in_list else char in self._layout.separators:
            self._pass(1)
            self._step = self._before_call
        elif char == "{" and self._layout.separators and not self._in_list:
            self._step = self._before_call
        elif char == "]" and self._in_list:
            self._held, self._passed = self._held[1:], ""
            self._step = self._behind_all
        else:
            self._step = self._behind_all
        return None

    def _behind_all(self) -> str | None:
        """Broken JSON may leave closing brackets in front of the mark."""
        end = self._layout.end_mark
        self._skip_blanks()
        if not end:
            return self._give_back()
        bare = self._held.lstrip("]} \t\r\n")
        if bare.startswith(end):
            return bare[len(end) :]
        return self._wait() if end.startswith(bare) else self._give_back()
