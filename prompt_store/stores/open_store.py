"""From what users call a store to the store."""

from __future__ import annotations

import hashlib
from pathlib import Path

from softbatch.prompt_store.stores.directory import PromptStore
from softbatch.prompt_store.stores.store import SoftPromptStore

GIB = 1 << 30
DEFAULT_CACHE_BYTES = 10 * GIB


def is_url(location: str) -> bool:
    return "://" in location


def open_store(
    location: str | Path, max_bytes: int, cache: Path | None = None, cache_bytes: int = DEFAULT_CACHE_BYTES
) -> SoftPromptStore:
    """A directory, or a bucket by its URL, whose copies lie in `cache`.

    Raises BucketAddressError, or OSError where the store cannot be reached."""
    text = str(location)
    if not is_url(text):
        return PromptStore(Path(location), max_bytes)
    from softbatch.prompt_store.stores.bucket import Bucket
    from softbatch.prompt_store.stores.object_store import ObjectStore

    if cache is None:
        raise ValueError("a bucket needs a directory for its copies")
    return ObjectStore(Bucket(text), cache, max_bytes, cache_bytes)


def cache_directory_of(location: str, base: Path) -> Path:
    """One of a bucket's own."""
    return base / "buckets" / hashlib.sha256(location.rstrip("/").encode()).hexdigest()[:16]
