"""The process that the crash tests kill; imports little, as it is started many times."""

from __future__ import annotations

from multiprocessing.synchronize import Event
from pathlib import Path

from softbatch.prompt_store.stores.directory import PromptStore

MAX_BYTES = 1 << 26


def add_many(root: Path, uploads: list[Path], prefix: str, ready: Event) -> None:
    """Adds, and now and then removes, as fast as it can."""
    store = PromptStore(root, MAX_BYTES)
    ready.set()
    for number in range(1000):
        store.add(f"{prefix}-{number}", uploads[number % len(uploads)])
        if number % 3 == 2:
            store.remove(f"{prefix}-{number - 1}")


def swap_many(root: Path, uploads: list[Path], ready: Event) -> None:
    """Puts one in the other's place as fast as it can."""
    store = PromptStore(root, MAX_BYTES)
    ready.set()
    for number in range(1000):
        store.swap("a", store.get("a").sha256, uploads[number % len(uploads)])
