"""What `model` may be where a client has no name to give."""

from __future__ import annotations

import argparse
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from softbatch.prompt_store.stores.directory import PromptStore
from softbatch.server.cli.settings_flags import add_flags, settings_from
from softbatch.server.routes.common import means_base_model


def settings_of(*flags: str) -> Any:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    return settings_from(parser.parse_args(flags))


def services(directory: Path, *flags: str) -> Any:
    settings = settings_of("--model", "/models/tiny", *flags)
    return SimpleNamespace(settings=settings, model_name="tiny", store=PromptStore(directory, 1 << 20))


def test_placeholders_unless_names_are_strict(tmp_path: Path) -> None:
    for name in (None, "tiny", "/models/tiny"):
        assert means_base_model(services(tmp_path), name)
        assert means_base_model(services(tmp_path, "--strict-model-names"), name)
    for name in ("", "tgi", "dummy"):
        assert means_base_model(services(tmp_path), name)
        assert not means_base_model(services(tmp_path, "--strict-model-names"), name)
    for name in ("tgl", "manual", "TGI", "gpt-5", "../tgi"):
        assert not means_base_model(services(tmp_path), name)


def test_a_soft_prompt_may_be_called_like_a_placeholder(tmp_path: Path) -> None:
    (tmp_path / "default.safetensors").write_bytes(b"")
    assert not means_base_model(services(tmp_path), "default")
    assert means_base_model(services(tmp_path), "model")


def test_flags_without_and_with_several_values(monkeypatch: pytest.MonkeyPatch) -> None:
    assert settings_of("--allow-origin", "*").allow_origin == ("*",)
    both = settings_of(
        "--allow-origin", "https://a.example,http://localhost:3000", "--allow-origin", "https://b.example/"
    )
    assert both.allow_origin == ("https://a.example", "http://localhost:3000", "https://b.example")
    monkeypatch.setenv("SOFTBATCH_STRICT_MODEL_NAMES", "true")
    assert settings_of().strict_model_names
