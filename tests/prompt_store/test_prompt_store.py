"""A store, directory or bucket, is the registry: names appear whole, once, and go without taking leases along."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from pathlib import Path

import pytest

from softbatch.prompt_store.soft_prompt_file import ModelSpec, SoftPromptError
from softbatch.prompt_store.stores.directory import NameTaken, PromptStore, UnknownPrompt
from softbatch.prompt_store.stores.store import SoftPromptStore
from tests.prompt_store.conftest import Place
from tests.support.soft_prompt_samples import FINGERPRINT, MAX_BYTES, SPEC, edit_manifest, names, soft_prompt, write


def test_an_added_prompt_is_described_and_found_by_everyone(
    place: Place, any_store: SoftPromptStore, file: Path
) -> None:
    before = int(time.time())
    stored = any_store.add("manual-v1.2", file)
    assert stored.name == "manual-v1.2"
    assert stored.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert stored.num_bytes == file.stat().st_size
    assert stored.manifest == soft_prompt().manifest
    assert before <= stored.created_at <= time.time()
    assert any_store.local_file(stored).read_bytes() == file.read_bytes()
    assert any_store.get("manual-v1.2") == stored
    other = place.open()
    assert (other.get("manual-v1.2").sha256, other.get("manual-v1.2").version) == (stored.sha256, stored.version)
    assert other.local_file(other.get("manual-v1.2")).read_bytes() == file.read_bytes()
    assert any_store.list() == [stored]
    assert any_store.broken() == []
    assert place.traces() == ["manual-v1.2"]


def test_the_upload_is_copied_not_taken(any_store: SoftPromptStore, file: Path) -> None:
    stored = any_store.add("a", file)
    with file.open("r+b") as upload:
        upload.truncate(10)
    assert hashlib.sha256(any_store.local_file(stored).read_bytes()).hexdigest() == stored.sha256
    assert not any_store.local_file(stored).stat().st_mode & 0o222, (
        "a lease shares the content, so nobody may write to it"
    )


def test_an_upload_is_read_once_so_what_was_checked_is_what_is_stored(any_store: SoftPromptStore, file: Path) -> None:
    content = file.read_bytes()
    file.unlink()
    os.mkfifo(file)
    writer = threading.Thread(target=file.write_bytes, args=(content,), daemon=True)
    writer.start()
    stored = any_store.add("a", file)
    writer.join()
    assert any_store.local_file(stored).read_bytes() == content


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "-a", ".a", "_a", "a/b", "../a", "a b", "a\n", "a\0", "ä", "a" * 129, "/etc/passwd"],
)
def test_bad_names_are_refused_with_the_rule_and_never_reach_the_disk(
    name: str, place: Place, any_store: SoftPromptStore, file: Path
) -> None:
    for act in (any_store.check_free, lambda name: any_store.add(name, file)):
        with pytest.raises(SoftPromptError, match="128 of the characters") as caught:
            act(name)
        assert (caught.value.code, caught.value.param) == ("invalid_name", "name")
    for act in (any_store.get, any_store.remove):
        with pytest.raises(UnknownPrompt):
            act(name)
    assert place.traces() == []


def test_names_up_to_the_longest_work(any_store: SoftPromptStore, file: Path) -> None:
    for name in ("a", "0", "A.b_c-d", "x" * 128, "a.safetensors"):
        any_store.check_free(name)
        any_store.add(name, file)
    assert names(any_store) == sorted(["a", "0", "A.b_c-d", "x" * 128, "a.safetensors"])


def test_a_name_is_given_once(any_store: SoftPromptStore, file: Path, tmp_path: Path) -> None:
    first = any_store.add("a", file)
    with pytest.raises(NameTaken) as caught:
        any_store.check_free("a")
    assert caught.value.code == "name_taken"
    with pytest.raises(NameTaken):
        any_store.add("a", write(tmp_path / "other", seed=1))
    assert any_store.get("a") == first
    any_store.remove("a")
    assert any_store.add("a", write(tmp_path / "other", seed=1)).sha256 != first.sha256


def test_unknown_names(any_store: SoftPromptStore, tmp_path: Path) -> None:
    for act in (any_store.get, any_store.remove, lambda name: any_store.export(name, tmp_path / "out")):
        with pytest.raises(UnknownPrompt, match="'nobody'") as caught:
            act("nobody")
        assert caught.value.code == "unknown_prompt"
    assert not (tmp_path / "out").exists()


def test_what_is_refused_leaves_no_trace(place: Place, any_store: SoftPromptStore, file: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    damaged.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(SoftPromptError):
        any_store.add("a", damaged)
    wrong = tmp_path / "wrong"
    wrong.write_bytes(file.read_bytes())
    edit_manifest(wrong, kind="lora")
    with pytest.raises(SoftPromptError):
        any_store.add("a", wrong)
    with pytest.raises(SoftPromptError) as caught:
        place.open(file.stat().st_size - 1).add("a", file)
    assert caught.value.code == "too_large"
    with pytest.raises(SoftPromptError) as caught:
        any_store.add("a", file, ModelSpec("other", "cd" * 32, 32, 3, 2, 8))
    assert caught.value.code == "wrong_model"
    with pytest.raises(SoftPromptError) as caught:
        any_store.add("a", file, ModelSpec("wide", FINGERPRINT, 64, 3, 2, 8))
    assert caught.value.code == "wrong_shape"
    with pytest.raises(FileNotFoundError):
        any_store.add("a", tmp_path / "none")
    assert place.traces() == []
    any_store.add("a", file, SPEC)


def test_changes_by_other_processes_are_seen(place: Place, file: Path, tmp_path: Path) -> None:
    one, other = place.open(), place.open()
    assert names(other) == []
    first = one.add("a", file)
    assert other.get("a").version == first.version
    one.remove("a")
    with pytest.raises(UnknownPrompt):
        other.get("a")
    second = one.add("a", write(tmp_path / "second", seed=1))
    assert other.get("a").sha256 == second.sha256 != first.sha256
    assert names(other) == ["a"]


def test_files_that_others_put_into_the_directory_are_seen(store: PromptStore, file: Path, tmp_path: Path) -> None:
    store.add("a", file)
    write(store.root / "dropped-in.safetensors", seed=2)
    assert names(store) == ["a", "dropped-in"]
    os.replace(write(tmp_path / "third", seed=3), store.root / "a.safetensors")
    assert store.get("a").sha256 == hashlib.sha256((store.root / "a.safetensors").read_bytes()).hexdigest()


def test_a_known_prompt_is_not_read_again(store: PromptStore, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store.add("a", file)
    reader = PromptStore(store.root, MAX_BYTES)
    reads: list[str] = []
    real = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda *args: reads.append("read") or real(*args))
    for _ in range(5):
        store.get("a")
        reader.get("a")
        reader.list()
    assert reads == ["read"], "only the reader's first get, and none by the store that added it"


def test_broken_files_are_told_apart_and_break_nothing(store: PromptStore, file: Path) -> None:
    good = store.add("good", file)
    (store.root / "cut.safetensors").write_bytes(file.read_bytes()[:-3])
    (store.root / "pickle.safetensors").write_bytes(b"\x80\x04K\x01.")
    (store.root / "bad name.safetensors").write_bytes(file.read_bytes())
    (store.root / "folder.safetensors").mkdir()
    os.mkfifo(store.root / "pipe.safetensors")
    (store.root / "dangling.safetensors").symlink_to(store.root / "nothing")
    (store.root / "README.txt").write_text("ignored")
    write(store.root / "big.safetensors", seed=1, n=4000)
    store.max_bytes = file.stat().st_size
    assert store.list() == [good]
    reasons = dict(store.broken())
    assert list(reasons) == sorted(["bad name", "big", "cut", "dangling", "folder", "pickle", "pipe"])
    assert "truncated" in reasons["cut"]
    assert "bytes" in reasons["big"]
    for _ in range(2):
        with pytest.raises(SoftPromptError, match="truncated") as caught:
            store.get("cut")
        assert not isinstance(caught.value, UnknownPrompt)
    os.replace(file, store.root / "cut.safetensors")
    assert names(store) == ["cut", "good"], "a repaired file is seen"
    store.remove("pickle")
    assert "pickle" not in dict(store.broken())


def test_export_copies_the_very_bytes(any_store: SoftPromptStore, file: Path, tmp_path: Path) -> None:
    any_store.add("a", file)
    (tmp_path / "out").write_text("old")
    any_store.export("a", tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == file.read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["out", "store", "upload"]
