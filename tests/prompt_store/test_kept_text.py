"""Texts kept beside soft prompts: with the right file, for its owner alone, and gone with it, whatever crashes."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from softbatch.prompt_store.manifest import ModelSpec, SoftPromptError
from softbatch.prompt_store.stores.directory import NameTaken, PromptStore
from softbatch.prompt_store.stores.kept_text import MAX_KEPT_BYTES, KeptText
from tests.prompt_store.conftest import Place
from tests.support.models import make_soft_prompt, save_prompt

SPEC = ModelSpec(name="m", fingerprint="0" * 64, hidden_size=8, num_layers=1, num_kv_heads=1, head_dim=8)
KEPT = KeptText(text="The office opens at seven.", recall=3)


def prompt_file(directory: Path, length: int) -> Path:
    return save_prompt(make_soft_prompt("kv", length, SPEC), directory, f"p{length}")


def texts(store: PromptStore) -> list[Path]:
    folder = store.root / ".texts"
    return sorted(folder.iterdir()) if folder.exists() else []


def test_a_text_is_kept_found_again_and_removed(place: Place, tmp_path: Path) -> None:
    store = place.open()
    stored = store.add("a.b", prompt_file(tmp_path, 4), kept=KEPT)
    assert stored.recall == 3
    again = place.open().get("a.b")
    assert again.recall == 3
    assert place.open().kept_text(again) == store.kept_text(stored) == KEPT
    assert [prompt.name for prompt in store.list()] == ["a.b"]
    assert store.broken() == []
    plain = store.add("a", prompt_file(tmp_path, 5))
    assert plain.recall is None
    assert store.kept_text(plain) is None
    store.remove("a")
    assert place.open().kept_text(again) == KEPT
    store.remove("a.b")
    assert place.texts() == 0


def test_a_text_is_for_its_owner_alone(tmp_path: Path) -> None:
    store = PromptStore(tmp_path / "store", 1 << 20)
    store.add("a.b", prompt_file(tmp_path, 4), kept=KEPT)
    assert [stat.S_IMODE(path.stat().st_mode) for path in texts(store)] == [0o600]


def test_whoever_loses_a_name_changes_nobodys_text(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = place.open()
    stored = store.add("a", prompt_file(tmp_path, 4), kept=KEPT)
    monkeypatch.setattr(store, "check_free", lambda name: None)  # both were told that it is free
    for length in (4, 5):
        with pytest.raises(NameTaken):
            store.add("a", prompt_file(tmp_path, length), kept=KeptText(text="Another text."))
    assert store.kept_text(stored) == KEPT
    assert place.texts() == 1


def test_what_a_crash_leaves_is_read_with_no_other_file_and_goes_in_time(tmp_path: Path) -> None:
    store = PromptStore(tmp_path / "store", 1 << 20)
    store.add("a", prompt_file(tmp_path, 4), kept=KEPT)
    (store.root / "a.safetensors").unlink()  # as if its link had never been made
    assert store.add("a", prompt_file(tmp_path, 5)).recall is None
    store.remove("a")
    assert texts(store) == []
    store.add("b", prompt_file(tmp_path, 4), kept=KEPT)
    (store.root / "b.safetensors").unlink()
    PromptStore(store.root, 1 << 20)
    assert len(texts(store)) == 1, "another process may be about to link it"
    os.utime(texts(store)[0], (0, 0))
    PromptStore(store.root, 1 << 20)
    assert texts(store) == []


@pytest.mark.parametrize(
    ("kept", "param"),
    [
        (KeptText(text=" \n"), "text"),
        (KeptText(text="é" * (MAX_KEPT_BYTES // 2 + 1)), "text"),
        (KeptText(text="x", recall=17), "recall"),
        (KeptText(text="x", recall=-1), "recall"),
    ],
)
def test_what_cannot_be_kept_registers_nothing(place: Place, tmp_path: Path, kept: KeptText, param: str) -> None:
    store = place.open()
    with pytest.raises(SoftPromptError) as refused:
        store.add("a", prompt_file(tmp_path, 4), kept=kept)
    assert refused.value.param == param
    assert store.list() == []
    assert place.traces() == []


def test_a_damaged_text_is_none(tmp_path: Path) -> None:
    store = PromptStore(tmp_path / "store", 1 << 20)
    stored = store.add("a", prompt_file(tmp_path, 4), kept=KEPT)
    texts(store)[0].write_bytes(b'{"text": 3}')
    assert store.kept_text(stored) is None
    assert PromptStore(tmp_path / "store", 1 << 20).get("a").recall is None
