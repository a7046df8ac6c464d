"""Requests, threads and processes share one directory: leases, races, and what the dead leave behind."""

from __future__ import annotations

import errno
import hashlib
import os
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from softbatch.prompt_store.soft_prompt_file import load, read_manifest
from softbatch.prompt_store.stores.directory import NameChanged, NameTaken, PromptStore, UnknownPrompt
from softbatch.prompt_store.stores.store import SoftPromptStore
from tests.prompt_store.conftest import BucketPlace, Place
from tests.support.bucket_server import object_store
from tests.support.soft_prompt_samples import MAX_BYTES, names, soft_prompt, write


def test_a_lease_outlives_the_name(any_store: SoftPromptStore, file: Path, tmp_path: Path) -> None:
    stored = any_store.add("a", file)
    leases = tmp_path / "run" / "leases"
    leased = any_store.lease(stored, leases)
    assert leased == leases / f"{stored.sha256}.safetensors"
    assert leased.stat().st_ino == any_store.local_file(stored).stat().st_ino, "a link, not a copy"
    assert any_store.lease(stored, leases) == leased
    any_store.remove("a")
    assert any_store.lease(stored, leases) == leased
    assert torch.equal(load(leased, MAX_BYTES).tensors["embeddings"], soft_prompt().tensors["embeddings"])
    assert os.listdir(leases) == [leased.name]


def test_two_names_with_one_content_share_a_lease(any_store: SoftPromptStore, file: Path, tmp_path: Path) -> None:
    leases = tmp_path / "leases"
    assert any_store.lease(any_store.add("a", file), leases) == any_store.lease(any_store.add("b", file), leases)


def test_a_lease_never_holds_what_took_the_name_meanwhile(place: Place, file: Path, tmp_path: Path) -> None:
    one, other = place.open(), place.open()
    one.add("a", file)
    stored = other.get("a")
    one.remove("a")
    with pytest.raises(UnknownPrompt):
        other.lease(stored, tmp_path / "leases")
    one.add("a", write(tmp_path / "other", seed=1))
    with pytest.raises(UnknownPrompt):
        other.lease(stored, tmp_path / "leases")
    assert os.listdir(tmp_path / "leases") == []


def test_leases_on_another_file_system_are_copies(
    store: PromptStore, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def link(*_: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    stored = store.add("a", file)
    monkeypatch.setattr(os, "link", link)
    leased = store.lease(stored, tmp_path / "leases")
    assert leased.read_bytes() == file.read_bytes()
    assert leased.stat().st_ino != stored.path.stat().st_ino
    os.replace(write(tmp_path / "other", seed=1), stored.path)
    leased.unlink()
    with pytest.raises(UnknownPrompt):
        store.lease(stored, tmp_path / "leases")
    assert os.listdir(tmp_path / "leases") == []


def test_temporary_files_of_the_dead_and_the_old_are_removed(store: PromptStore, file: Path) -> None:
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    pattern = store.root.joinpath
    store.add("a", file)
    host = _own_temp_name(store, file).split("-")[1]
    dead = pattern(f".add-{host}-{child}-{'0' * 16}")
    running = pattern(f".add-{host}-{os.getpid()}-{'1' * 16}")
    elsewhere = pattern(f".add-{'f' * 8}-{child}-{'2' * 16}")
    old = pattern(f".add-{'f' * 8}-{os.getpid()}-{'3' * 16}")
    foreign = pattern(".add-notes")
    for path in (dead, running, elsewhere, old, foreign):
        path.write_bytes(b"x")
    os.utime(old, (time.time() - 4000, time.time() - 4000))
    again = PromptStore(store.root, MAX_BYTES)
    assert not dead.exists()
    assert not old.exists()
    assert running.exists(), "its owner is alive"
    assert elsewhere.exists(), "another host's process numbers mean nothing here"
    assert foreign.exists()
    assert names(again) == ["a"]


def _own_temp_name(store: PromptStore, file: Path) -> str:
    """The temporary name the store itself chooses, seen while it adds."""
    seen: list[str] = []
    real = os.link
    os.link = lambda source, *rest: seen.append(Path(source).name) or real(source, *rest)  # type: ignore[assignment]
    try:
        store.add("probe", file)
    finally:
        os.link = real
    store.remove("probe")
    return seen[0]


def test_of_many_adding_one_name_at_once_one_wins(
    strict_place: Place, any_store: SoftPromptStore, tmp_path: Path
) -> None:
    uploads = [write(tmp_path / f"upload{i}", seed=i) for i in range(8)]
    start = threading.Barrier(len(uploads))
    outcomes: Counter[str] = Counter()

    def add(upload: Path, handle: SoftPromptStore) -> None:
        start.wait()
        try:
            handle.add("a", upload)
            outcomes["added"] += 1
        except NameTaken:
            outcomes["taken"] += 1

    threads = [threading.Thread(target=add, args=(upload, strict_place.open())) for upload in uploads]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes == {"added": 1, "taken": 7}
    assert strict_place.traces() == ["a"]
    load(any_store.local_file(any_store.get("a")), MAX_BYTES)


def test_a_file_that_vanishes_while_it_is_opened_is_missing_not_broken(tmp_path: Path) -> None:
    path, source = tmp_path / "p.safetensors", write(tmp_path / "source", seed=0)
    stop = threading.Event()

    def come_and_go() -> None:
        while not stop.is_set():
            os.link(source, path)
            path.unlink()

    other = threading.Thread(target=come_and_go)
    other.start()
    outcomes: Counter[str] = Counter()
    try:
        for number in range(20_000):
            try:
                if number % 2:
                    read_manifest(path, MAX_BYTES)
                else:
                    load(path, MAX_BYTES)
                outcomes["read"] += 1
            except FileNotFoundError:
                outcomes["missing"] += 1
    finally:
        stop.set()
        other.join()
    assert min(outcomes["read"], outcomes["missing"]) > 0


class RegistryMachine(RuleBasedStateMachine):
    """Two handles on one directory behave like one dictionary, whatever the order of calls."""

    url: str | None = None  # of a bucket, below which each run has a prefix of its own
    some_name = st.sampled_from(["a", "b", "c.d"])
    which = st.integers(0, 1)

    @initialize()
    def begin(self) -> None:
        self.base = Path(tempfile.mkdtemp(dir=os.environ["SOFT_PROMPT_TEST_DIR"]))
        self.stores = self.open_two(self.base / "store")
        self.expected: dict[str, str] = {}

    def open_two(self, root: Path) -> list[SoftPromptStore]:
        if self.url is None:
            return [PromptStore(root, MAX_BYTES) for _ in range(2)]
        url = f"{self.url}/{self.base.name}"
        return [object_store(url, root / str(number), MAX_BYTES) for number in range(2)]

    @rule(name=some_name, seed=st.integers(0, 3), which=which)
    def add(self, name: str, seed: int, which: int) -> None:
        upload = write(self.base / "upload", seed)
        if name in self.expected:
            with pytest.raises(NameTaken):
                self.stores[which].add(name, upload)
        else:
            self.expected[name] = self.stores[which].add(name, upload).sha256

    @rule(name=some_name, seed=st.integers(0, 3), which=which, previous=st.integers(0, 3))
    def swap(self, name: str, seed: int, which: int, previous: int) -> None:
        """For the one that is there, and as often for another."""
        upload = write(self.base / "upload", seed)
        wanted = self.expected.get(name, "") if previous < 2 else str(previous) * 64
        if self.expected.get(name) == wanted:
            self.expected[name] = self.stores[which].swap(name, wanted, upload).sha256
        else:
            with pytest.raises(NameChanged):
                self.stores[which].swap(name, wanted, upload)

    @rule(name=some_name, which=which)
    def remove(self, name: str, which: int) -> None:
        if self.expected.pop(name, None):
            self.stores[which].remove(name)
        else:
            with pytest.raises(UnknownPrompt):
                self.stores[which].remove(name)

    @rule(name=some_name, which=which)
    def lease(self, name: str, which: int) -> None:
        if name in self.expected:
            stored = self.stores[which].get(name)
            leased = self.stores[which].lease(stored, self.base / "leases")
            assert hashlib.sha256(leased.read_bytes()).hexdigest() == self.expected[name] == leased.stem

    @invariant()
    def all_handles_agree(self) -> None:
        for store in getattr(self, "stores", []):
            assert {stored.name: stored.sha256 for stored in store.list()} == self.expected
            assert store.broken() == []


class BucketRegistryMachine(RegistryMachine):
    """The same of one bucket."""


def test_two_handles_on_one_store_behave_like_one_dictionary(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOFT_PROMPT_TEST_DIR", str(tmp_path))
    is_bucket = isinstance(place, BucketPlace)
    machine = BucketRegistryMachine if is_bucket else RegistryMachine
    machine.url = place.url if isinstance(place, BucketPlace) else None
    machine.TestCase.settings = settings(
        max_examples=6 if is_bucket else 25,
        stateful_step_count=12 if is_bucket else 20,
        derandomize=True,
        deadline=None,
    )
    case = machine.TestCase("runTest")
    case.runTest()
