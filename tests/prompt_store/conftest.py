"""Fixtures that several test files of prompt_store share."""

from __future__ import annotations

import os
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import pytest

from softbatch.prompt_store.soft_prompt_file import save
from softbatch.prompt_store.stores.directory import PromptStore
from softbatch.prompt_store.stores.object_store import ObjectStore
from softbatch.prompt_store.stores.store import SoftPromptStore
from tests.support.bucket_server import BucketServer, object_store
from tests.support.soft_prompt_samples import MAX_BYTES, soft_prompt, write


class Place(Protocol):
    """Where stores keep their soft prompts, whoever opens them."""

    def open(self, max_bytes: int = MAX_BYTES) -> SoftPromptStore:
        """Another handle, as another process or machine has it."""
        ...

    def traces(self) -> list[str]:
        """The names that anything lies there for, sorted."""
        ...

    def texts(self) -> int:
        """How many texts are kept there."""
        ...


@dataclass(frozen=True)
class DirectoryPlace:
    root: Path

    def open(self, max_bytes: int = MAX_BYTES) -> SoftPromptStore:
        return PromptStore(self.root, max_bytes)

    def traces(self) -> list[str]:
        return sorted(name.removesuffix(".safetensors") for name in os.listdir(self.root))

    def texts(self) -> int:
        return len(list(self.root.glob(".texts/*")))


@dataclass(frozen=True)
class BucketPlace:
    """Each handle has a cache of its own."""

    url: str
    root: Path

    def open(self, max_bytes: int = MAX_BYTES) -> SoftPromptStore:
        return object_store(self.url, self.root / uuid.uuid4().hex, max_bytes)

    def keys(self) -> list[str]:
        return sorted(found.key for found in object_store(self.url, self.root / "look", 1).bucket.list(""))

    def traces(self) -> list[str]:
        return sorted({key.split("/")[1].removesuffix(".json") for key in self.keys()})

    def texts(self) -> int:
        return sum(key.startswith("texts/") for key in self.keys())


@pytest.fixture(params=["embeddings", "kv"])
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / "prompt.safetensors"
    save(soft_prompt(request.param), path)
    return path


@pytest.fixture(params=["directory", "bucket"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    root = tmp_path / "store"
    root.mkdir()
    if request.param == "directory":
        return DirectoryPlace(root)
    server: BucketServer = request.getfixturevalue("bucket_server")
    return BucketPlace(server.new_url(), root)


@pytest.fixture
def any_store(place: Place) -> SoftPromptStore:
    return place.open()


@pytest.fixture
def strict_place(place: Place) -> Place:
    """One that keeps apart who writes at the same moment."""
    store = place.open()
    if isinstance(store, ObjectStore) and not store.offers.create:
        pytest.skip("it offers no conditional writes, and says so")
    return place


@pytest.fixture
def store(tmp_path: Path) -> PromptStore:
    """A directory, for what only that can do."""
    return PromptStore(tmp_path / "store", MAX_BYTES)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A sound upload."""
    return write(tmp_path / "upload", seed=0)
