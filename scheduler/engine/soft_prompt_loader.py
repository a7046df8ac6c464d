"""Reads soft prompts' files in a thread of its own, so that loading one stalls nobody."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

from softbatch.scheduler.protocol import SoftPromptRef

T = TypeVar("T")  # what a file becomes


@dataclass(frozen=True)
class Reading(Generic[T]):
    """`result` is there once it has been read; `since` is when that was asked for (monotonic)."""

    ref: SoftPromptRef
    since: float
    result: Future[T]


class SoftPromptReader(Generic[T]):
    """Owns the thread, and what it has read until that is collected. Any thread may call it.

    `on_read` is called, in whatever thread, whenever there is something to collect.
    """

    def __init__(self, read: Callable[[SoftPromptRef], T], prepare: Callable[[], None]) -> None:
        """`prepare` is called once in that thread, before anything is read."""
        self._read = read
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="soft-prompt-reader", initializer=prepare)
        self._readings: dict[str, Reading[T]] = {}
        self._lock = threading.Lock()
        self.on_read: Callable[[], None] = _nothing

    def __len__(self) -> int:
        return len(self._readings)

    def start(self, ref: SoftPromptRef) -> None:
        """Without effect where it has not been collected since it was started last."""
        with self._lock:
            if ref.sha256 in self._readings:
                return
            reading = Reading(ref, time.monotonic(), self._thread.submit(self._read, ref))
            self._readings[ref.sha256] = reading
        reading.result.add_done_callback(lambda _: self.on_read())

    def take_read(self) -> list[Reading[T]]:
        """Those that are through, each once."""
        with self._lock:
            done = [reading for reading in self._readings.values() if reading.result.done()]
            for reading in done:
                del self._readings[reading.ref.sha256]
        return done

    def put_back(self, reading: Reading[T]) -> None:
        """To be collected another time."""
        with self._lock:
            self._readings.setdefault(reading.ref.sha256, reading)

    def close(self) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)


def _nothing() -> None:
    pass
