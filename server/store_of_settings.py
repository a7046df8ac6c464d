"""The prompt store that the settings name."""

from __future__ import annotations

from softbatch.prompt_store.stores.open_store import open_store
from softbatch.prompt_store.stores.store import SoftPromptStore
from softbatch.server.settings import Settings


def store_of(settings: Settings) -> SoftPromptStore:
    """Raises BucketAddressError, or OSError where the store cannot be reached."""
    max_bytes = settings.max_prompt_mib << 20
    return open_store(settings.prompt_store, max_bytes, settings.store_root, settings.prompt_cache_bytes)
