"""Several models of one application: none has another one's directories."""

from __future__ import annotations

from pathlib import Path

import pytest

from softbatch.server.cluster.cluster_settings import with_own_directories
from softbatch.server.settings import Settings


def settings(**given: object) -> Settings:
    return Settings.model_validate(given)


def test_models_on_one_directory_are_refused(tmp_path: Path) -> None:
    """One replica has the lock of a directory: it would fail the other model's compressions and run its batches."""
    link = tmp_path / "link"
    link.symlink_to(tmp_path)
    one, two = settings(prompt_store=tmp_path), settings(prompt_store=link)
    with pytest.raises(ValueError, match=r"'a' and 'b' .*its own prompt_store"):
        with_own_directories({"a": one, "b": two})
    with pytest.raises(ValueError, match="prompt_store"):  # both have the default
        with_own_directories({"a": settings(), "b": settings()})
    shared = {name: settings(prompt_store=tmp_path / name, batch_dir=tmp_path / "batches") for name in ("a", "b")}
    with pytest.raises(ValueError, match=r"its own batch_dir"):
        with_own_directories(shared)


def test_models_with_directories_of_their_own_are_taken(tmp_path: Path) -> None:
    apart = {name: settings(prompt_store=tmp_path / name) for name in ("a", "b")}
    assert with_own_directories(apart) == list(apart.values())
    assert with_own_directories({"a": settings()}) == [settings()]
    of_bucket = with_own_directories({name: settings(prompt_store="s3://bucket/prompts") for name in ("a/x", "b")})
    directories = [settings.batch_dir for settings in of_bucket]
    assert len(set(directories)) == 2
    assert None not in directories
