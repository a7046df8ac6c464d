"""Fixtures that several test files of prompt_store share."""

from __future__ import annotations

from pathlib import Path

import pytest

from softbatch.prompt_store.soft_prompt_file import save
from softbatch.prompt_store.stores.directory import PromptStore
from tests.support.soft_prompt_samples import MAX_BYTES, soft_prompt, write


@pytest.fixture(params=["embeddings", "kv"])
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / "prompt.safetensors"
    save(soft_prompt(request.param), path)
    return path


@pytest.fixture
def store(tmp_path: Path) -> PromptStore:
    return PromptStore(tmp_path / "store", MAX_BYTES)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A sound upload."""
    return write(tmp_path / "upload", seed=0)
