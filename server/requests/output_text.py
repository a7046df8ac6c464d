"""What of an output may be shown: its text up to a stop string, and each token's part of that text."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from softbatch.server.requests.detokenizer import Detokenizer, TokenBytes


class StopStrings:
    """Lets text through until a stop string appears; holds back what could still become one.

    Special tokens are looked at too, but never shown: `push` them with `hidden`.
    """

    def __init__(self, stops: Sequence[str], include: bool) -> None:
        self._stops = tuple(stops)
        self._include = include
        self._held = ""
        self._hidden: list[tuple[int, int]] = []  # places in what is held
        self.found: str | None = None

    def push(self, piece: str, *, hidden: bool = False) -> str:
        """The text that may be shown now; afterwards `found` names the stop string if one has appeared."""
        if not self._stops:
            return "" if hidden else piece
        if hidden:
            self._hidden.append((len(self._held), len(self._held) + len(piece)))
        self._held += piece
        hits = [(at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if hits:
            # The earliest hit wins; of two at one place the shorter, as it was complete first.
            at, self.found = min(hits, key=lambda hit: (hit[0], len(hit[1])))
            shown = self._take(at + len(self.found) * self._include)
            self._held = ""
            return shown
        keep = max((self._overlap(stop) for stop in self._stops), default=0)
        return self._take(len(self._held) - keep)

    def flush(self) -> str:
        return self._take(len(self._held))

    def _take(self, end: int) -> str:
        """The held text before `end` without what is hidden; it is held no longer."""
        shown, self._held = self._held[:end], self._held[end:]
        for start, stop in reversed(self._hidden):
            shown = shown[:start] + shown[stop:]
        self._hidden = [(max(start - end, 0), stop - end) for start, stop in self._hidden if stop > end]
        return shown

    def _overlap(self, stop: str) -> int:
        """Length of the longest end of the held text that is a proper start of `stop`."""
        for length in range(min(len(stop) - 1, len(self._held)), 0, -1):
            if self._held.endswith(stop[:length]):
                return length
        return 0


class OutputText:
    """The shown text of one output as its tokens come, and the part of it that each token has brought.

    A token's part is told when all of it is shown. Together the parts are the text, in UTF-8.
    """

    def __init__(
        self,
        tokens: TokenBytes,
        prompt: Sequence[int],
        stops: Sequence[str],
        *,
        include_stop: bool,
        min_tokens: int = 0,
        shown_tokens: frozenset[int] = frozenset(),
    ) -> None:
        self._detokenizer = Detokenizer(tokens, prompt, shown=shown_tokens)
        self._stops = StopStrings(stops, include_stop)
        # Only a stop string can hold back or cut off whole characters.
        self._can_cut = bool(stops)
        watched = {token: name for stop in stops for token, name in tokens.hidden_in(stop).items()}
        self._watched = {token: name for token, name in watched.items() if token not in shown_tokens}
        self._unchecked = min_tokens
        self._settled: deque[bytes] = deque()
        self._shown_bytes = 0  # of the tokens in `_settled`
        self._parts: list[bytes] = []

    @property
    def found(self) -> str | None:
        """The stop string that has ended the text."""
        return self._stops.found

    def push(self, token_id: int) -> str:
        """What may be shown because of this token."""
        text, parts = self._detokenizer.push(token_id)
        if not self._can_cut:
            self._parts += parts
            return text
        if self._unchecked > 0:
            self._unchecked -= 1
            return self._release(text, parts)
        if token_id in self._watched:
            # Whatever is before it ends here, so that it can be looked at in its place.
            late, late_parts = self._detokenizer.flush()
            shown = self._stops.push(text + late)
            if self.found is None:
                shown += self._stops.push(self._watched[token_id], hidden=True)
            return self._release(shown, [*parts, *late_parts])
        return self._release(self._stops.push(text), parts)

    def finish(self) -> str:
        """What is still held back; it may hold a stop string."""
        text, parts = self._detokenizer.flush()
        if not self._can_cut:
            self._parts += parts
            return text
        shown = self._stops.push(text)
        return self._release(shown if self.found is not None else shown + self._stops.flush(), parts)

    def take_parts(self) -> list[bytes]:
        """Of the tokens whose part has become certain since the last call, oldest first. Behind the end of the text
        all are empty, and those of the last tokens may be missing."""
        parts, self._parts = self._parts, []
        return parts

    def _release(self, shown: str, parts: Sequence[bytes]) -> str:
        self._settled += parts
        self._shown_bytes += len(shown) if shown.isascii() else len(shown.encode())
        while self._settled and (len(self._settled[0]) <= self._shown_bytes or self.found is not None):
            part = self._settled.popleft()[: self._shown_bytes]
            self._shown_bytes -= len(part)
            self._parts.append(part)
        return shown
