"""What another server needs to go on with an HTTP request: what was drawn at random, and what the engine brought."""

from __future__ import annotations

import hashlib
import itertools
import time
import uuid
from array import array
from collections.abc import Callable, Iterable
from contextvars import ContextVar

import msgspec

from softbatch.scheduler.protocol import SequenceOutput
from softbatch.server.request_failures import SequenceChanged


class SequenceOpened(msgspec.Struct, frozen=True, tag="opened"):
    """All of a sequence that neither the HTTP request nor the engine says; `place` is its number in the request.
    Only the model with the fingerprint `model` can go on with it, and only behind the same soft prompt and the same
    prompt, of which `behind` is a hash: names and texts may mean something else by then."""

    place: int
    request_id: str
    seed: int
    created: int
    model: str = ""
    behind: str = ""


class SequenceBrought(msgspec.Struct, frozen=True, tag="brought"):
    """Outputs as a route got them together, `at` so many Unix seconds: made into a reply again, they give the same
    events."""

    place: int
    outputs: list[SequenceOutput]
    at: int = 0


Entry = SequenceOpened | SequenceBrought


class Journal:
    """Of one HTTP request. `write` is given every entry before what a route makes of it; `entries` are those of the
    servers that had the request before.

    Sequences are prepared in the order of the request, so their numbers are the same on every server.
    """

    def __init__(self, write: Callable[[Entry], None], entries: Iterable[Entry] = (), model: str = "") -> None:
        self._write = write
        self._model = model
        self._opened: dict[int, SequenceOpened] = {}
        self._brought: dict[int, list[list[SequenceOutput]]] = {}
        self._ended: dict[int, int] = {}
        self._num_sequences = 0
        self._num_namers = 0
        for entry in entries:
            if isinstance(entry, SequenceOpened):
                self._opened[entry.place] = entry
            else:
                self._brought.setdefault(entry.place, []).append(entry.outputs)
                self._ended[entry.place] = entry.at

    def open(self, seed: int, token_ids: list[int], soft_prompt: str) -> SequenceOpened:
        """The next sequence: as it was opened before, or new. Raises SequenceChanged."""
        place, self._num_sequences = self._num_sequences, self._num_sequences + 1
        opened = self._opened.get(place)
        behind = hashlib.blake2b(array("q", token_ids).tobytes(), key=soft_prompt.encode(), digest_size=16).hexdigest()
        if opened is None:
            opened = self._opened[place] = msgspec.structs.replace(_opened(place, seed, self._model), behind=behind)
            self._write(opened)
        elif opened.behind != behind:
            raise SequenceChanged
        return opened

    def brought(self, place: int) -> list[list[SequenceOutput]]:
        """What earlier servers have brought of a sequence."""
        return self._brought.get(place, [])

    def ended_at(self, place: int) -> int:
        """When the last of a sequence was brought, on whichever server: now, if nothing was."""
        return self._ended.get(place) or int(time.time())

    def bring(self, place: int, outputs: list[SequenceOutput]) -> None:
        # Their names are that of the sequence: not kept again with each.
        kept = [msgspec.structs.replace(output, request_id="") for output in outputs]
        self._ended[place] = at = int(time.time())
        self._write(SequenceBrought(place, kept, at))

    def namer(self) -> Callable[[], str]:
        """Draws 32 hexadecimal digits, the same on every server, whatever other namers have drawn: the choices of a
        request may come in another order there."""
        self._num_namers += 1
        number, drawn = self._num_namers, itertools.count()

        def draw() -> str:
            first = self._opened.get(0)
            seed = f"{first.request_id}/{number}/{next(drawn)}" if first else uuid.uuid4().hex
            return hashlib.sha256(seed.encode()).hexdigest()[:32]

        return draw


_kept: ContextVar[Journal | None] = ContextVar("kept", default=None)


def keep_journal(journal: Journal) -> None:
    """From here on, of whatever this task and its children start."""
    _kept.set(journal)


def kept_journal() -> Journal | None:
    """None where nobody could go on with the request."""
    return _kept.get()


def open_sequence(seed: int, token_ids: list[int], soft_prompt: str = "") -> SequenceOpened:
    """`soft_prompt` is a content hash, empty if there is none. Raises SequenceChanged."""
    journal = _kept.get()
    return journal.open(seed, token_ids, soft_prompt) if journal is not None else _opened(0, seed)


def unique_names() -> Callable[[], str]:
    """Draws 32 hexadecimal digits that nobody else has. One for each choice, made in their order."""
    journal = _kept.get()
    return journal.namer() if journal is not None else lambda: uuid.uuid4().hex


def _opened(place: int, seed: int, model: str = "") -> SequenceOpened:
    return SequenceOpened(place, uuid.uuid4().hex, seed, int(time.time()), model)
