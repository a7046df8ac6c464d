"""What --prompt-store may be, and where a bucket's copies lie."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from softbatch.prompt_store.stores.directory import PromptStore
from softbatch.server.settings import Settings
from softbatch.server.store_of_settings import store_of


def test_a_directory_is_what_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for given in ("prompts", str(tmp_path / "prompts"), f"file://{tmp_path}/prompts", tmp_path / "prompts"):
        settings = Settings(prompt_store=given, max_prompt_mib=65_536)
        assert settings.prompt_store == settings.store_root == tmp_path / "prompts"
    assert isinstance(store_of(settings), PromptStore)


def test_a_bucket_keeps_its_address_and_has_copies_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    one = Settings(prompt_store="s3://bucket/prefix/")
    assert one.prompt_store == "s3://bucket/prefix"
    assert one.store_root.is_relative_to(tmp_path / "cache" / "softbatch" / "buckets")
    other = Settings(prompt_store="s3://bucket/other", prompt_cache=tmp_path / "mine")
    assert other.store_root.is_relative_to(tmp_path / "mine")
    assert other.store_root.name != one.store_root.name


def test_copies_have_room_for_one_soft_prompt() -> None:
    with pytest.raises(ValidationError, match=r"--prompt-cache-gib 0.1 is less than one soft prompt may have"):
        Settings(prompt_store="s3://bucket/prefix", prompt_cache_gib=0.1)
