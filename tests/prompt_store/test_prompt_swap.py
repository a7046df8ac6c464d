"""A preview is swapped for the trained one: its name leads to one of the two, or to what a user has put there since."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import signal
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from softbatch.prompt_store.soft_prompt_file import SoftPromptError, load
from softbatch.prompt_store.stores.bucket import Bucket
from softbatch.prompt_store.stores.directory import NameTaken, PromptStore
from softbatch.prompt_store.stores.kept_text import KeptText
from softbatch.prompt_store.stores.object_store import ObjectStore
from softbatch.prompt_store.stores.store import NameChanged, SoftPromptStore
from tests.prompt_store.conftest import Place
from tests.support.bucket_server import QUICK, BucketServer, object_store
from tests.support.faulty_proxy import FaultyProxy
from tests.support.killed_calls import killed_before_call
from tests.support.prompt_store_writer import swap_many
from tests.support.soft_prompt_samples import MAX_BYTES, names, write

KEPT = KeptText(text="The office opens at seven.", recall=3)


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    return write(tmp_path / "trained", seed=1)


def test_the_trained_one_takes_the_place_for_everybody(
    place: Place, any_store: SoftPromptStore, file: Path, trained: Path, tmp_path: Path
) -> None:
    preview = any_store.add("a", file, kept=KEPT)
    other = place.open()
    seen = other.get("a")
    leased = other.lease(seen, tmp_path / "leases")
    stored = any_store.swap("a", preview.sha256, trained, KEPT)
    assert stored.sha256 != preview.sha256
    for store in (any_store, other):
        assert store.get("a").version == stored.version != seen.version
        assert [found.sha256 for found in store.list()] == [stored.sha256]
        assert store.local_file(store.get("a")).read_bytes() == trained.read_bytes()
        assert store.open("a")[0].sha256 == stored.sha256
        assert store.kept_text(store.get("a")) == KEPT
        assert store.kept_text(seen) == KEPT, "of a request that still uses the preview"
    assert leased.read_bytes() == file.read_bytes(), "whoever uses the preview goes on"
    assert place.traces() == [".texts", "a"] if isinstance(any_store, PromptStore) else ["a"]
    any_store.remove("a")
    assert place.texts() == 0


def test_what_a_user_has_done_to_the_name_stays(
    place: Place, any_store: SoftPromptStore, file: Path, trained: Path, tmp_path: Path
) -> None:
    other, by_hand = place.open(), write(tmp_path / "by-hand", seed=2)
    preview = any_store.add("a", file)
    other.remove("a")
    for _ in range(2):
        with pytest.raises(NameChanged, match="was deleted meanwhile") as caught:
            any_store.swap("a", preview.sha256, trained, KEPT)
        assert (caught.value.code, caught.value.is_gone) == ("name_changed", True)
    assert any_store.list() == []
    stored = other.add("a", by_hand)
    with pytest.raises(NameChanged, match="is another one by now"):
        any_store.swap("a", preview.sha256, trained, KEPT)
    with pytest.raises(NameChanged):
        any_store.remove("a", only=preview.sha256)
    assert any_store.get("a").sha256 == stored.sha256
    assert place.texts() == 0, "what did not get the name leaves nothing behind"
    any_store.remove("a", only=stored.sha256)
    with pytest.raises(NameChanged):
        any_store.remove("a", only=stored.sha256)
    assert place.traces() in ([], [".texts"])


def test_what_is_no_soft_prompt_takes_no_place(any_store: SoftPromptStore, file: Path, tmp_path: Path) -> None:
    preview = any_store.add("a", file)
    damaged = tmp_path / "damaged"
    damaged.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(SoftPromptError):
        any_store.swap("a", preview.sha256, damaged)
    assert any_store.get("a") == preview
    assert any_store.local_file(preview).read_bytes() == file.read_bytes()


def test_whoever_looks_sees_one_of_the_two_at_every_moment(
    place: Place, any_store: SoftPromptStore, file: Path, trained: Path, tmp_path: Path
) -> None:
    """By the swapping process's own handle, and by another's."""
    contents, over, outcomes = [file, trained], threading.Event(), Counter[str]()
    current = any_store.add("a", file).sha256
    known = {any_store.get("a").sha256}
    problems: list[str] = []

    def look(store: SoftPromptStore) -> None:
        while not over.is_set():
            outcomes["looks"] += 1
            try:
                if not store.is_known("a") or len(store.list()) != 1 or store.broken():
                    problems.append("it is not there")
                outcomes[store.get("a").sha256] += 1
            except SoftPromptError as error:
                problems.append(str(error))

    stores = (any_store, place.open())
    assert stores[1].get("a").sha256 in known
    threads = [threading.Thread(target=look, args=(store,)) for store in stores]
    for thread in threads:
        thread.start()
    try:
        for number in range(1, 9):
            current = any_store.swap("a", current, contents[number % 2]).sha256
            known.add(current)
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert problems == []
    assert outcomes["looks"] > 8
    assert set(outcomes) <= {"looks", *known}


def test_of_many_that_swap_or_delete_at_once_one_gets_through(
    strict_place: Place, any_store: SoftPromptStore, file: Path, tmp_path: Path
) -> None:
    preview, start, outcomes = any_store.add("a", file), threading.Barrier(6), Counter[str]()
    uploads = [write(tmp_path / f"upload{i}", seed=i + 1) for i in range(5)]

    def change(upload: Path | None, store: SoftPromptStore) -> None:
        start.wait()
        with contextlib.suppress(NameChanged):
            if upload is None:
                store.remove("a", only=preview.sha256)
                outcomes["deleted"] += 1
            else:
                store.swap("a", preview.sha256, upload)
                outcomes["swapped"] += 1

    threads = [threading.Thread(target=change, args=(upload, strict_place.open())) for upload in (*uploads, None)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes["swapped"] <= 1
    assert outcomes["deleted"] + outcomes["swapped"] >= 1
    if isinstance(any_store, PromptStore):
        assert sum(outcomes.values()) == 1
    if names(any_store):
        load(any_store.local_file(any_store.get("a")), MAX_BYTES)
    assert any_store.broken() == []


def test_sigkill_during_swaps_leaves_one_of_the_two(tmp_path: Path, file: Path, trained: Path) -> None:
    root = tmp_path / "store"
    stored = PromptStore(root, MAX_BYTES).add("a", file)
    known = {stored.sha256}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["softbatch.prompt_store.stores.directory"])
    moments = random.Random(0)
    for _ in range(8):
        ready = context.Event()
        child = context.Process(target=swap_many, args=(root, [file, trained], ready), daemon=True)
        child.start()
        try:
            assert ready.wait(60)
            watcher, until = PromptStore(root, MAX_BYTES), time.monotonic() + moments.uniform(0.0, 0.1)
            # The first child lives until it has swapped something, however slow the disk is.
            while time.monotonic() < until or (len(known) < 2 and time.monotonic() < until + 60):
                assert watcher.broken() == []
                (seen,) = watcher.list()
                known.add(seen.sha256)
        finally:
            child.kill()
            child.join()
        assert child.exitcode == -signal.SIGKILL
        after = PromptStore(root, MAX_BYTES)
        assert [name for name in os.listdir(root) if name.startswith(".")] == []
        (found,) = after.list()
        load(found.path, MAX_BYTES)
        known.add(found.sha256)
    assert len(known) == 2, "nothing was swapped"


def test_a_swap_killed_at_any_call_is_done_or_not_and_can_be_done_again(
    bucket_server: BucketServer, file: Path, trained: Path, tmp_path: Path
) -> None:
    url, outcomes, is_killed, last = bucket_server.new_url(), set[bool](), True, 0
    offers = Bucket(url, QUICK).probe()
    while is_killed:
        store = object_store(f"{url}/{last}", tmp_path / f"one{last}", MAX_BYTES)
        store.offers = offers
        preview = store.add("a", file, kept=KEPT)
        with killed_before_call(last) as fate:
            store.swap("a", preview.sha256, trained, KEPT)
        is_killed, last = fate.is_killed, last + 1
        other = object_store(store.location, tmp_path / f"other{last}", MAX_BYTES)
        other.offers = offers
        assert other.broken() == []
        found = other.get("a")
        outcomes.add(found.sha256 == preview.sha256)
        if found.sha256 == preview.sha256:
            assert other.local_file(found).read_bytes() == file.read_bytes()
            found = other.swap("a", preview.sha256, trained, KEPT)
        assert other.local_file(found).read_bytes() == trained.read_bytes()
        assert other.kept_text(found) == KEPT
    assert outcomes == {True, False}


def test_whoever_was_slow_to_see_a_swap_finds_the_trained_one(
    bucket_server: BucketServer, file: Path, trained: Path, tmp_path: Path
) -> None:
    """The preview's object is gone, and this machine has no copy of it; nor of a text that was never asked for."""
    url = bucket_server.new_url()
    writer = object_store(url, tmp_path / "writer", MAX_BYTES)
    reader = object_store(url, tmp_path / "reader", MAX_BYTES, refresh=60)
    preview = writer.add("a", file, kept=KEPT)
    stale = reader.get("a")
    stored = writer.swap("a", preview.sha256, trained, KEPT)
    assert reader.get("a") == stale, "for as long as a name may be old"
    found, opened = reader.open("a")
    with opened:
        assert (found.sha256, opened.read()) == (stored.sha256, trained.read_bytes())
    assert reader.kept_text(stale) == KEPT
    assert {key.key.split("/")[0] for key in writer.bucket.list("")} == {"objects", "prompts", "texts"}
    assert len(writer.bucket.list("objects/")) == len(writer.bucket.list("texts/")) == 1


def test_a_bucket_without_conditional_writes_swaps_as_well_as_it_can(file: Path, trained: Path, tmp_path: Path) -> None:
    store = ObjectStore(Bucket(f"memory://{tmp_path.name}/p", QUICK), tmp_path / "one", MAX_BYTES, 1 << 30, 0)
    assert not store.offers.replace
    preview = store.add("a", file)
    stored = store.swap("a", preview.sha256, trained)
    assert store.list() == [stored]
    assert store.local_file(store.get("a")).read_bytes() == trained.read_bytes()
    with pytest.raises(NameChanged):
        store.swap("a", preview.sha256, file)
    with pytest.raises(NameTaken):
        store.add("a", file)
    assert len(store.bucket.list("objects/")) == 1


def test_a_name_is_known_while_its_new_record_is_read(
    bucket_server: BucketServer, proxy: FaultyProxy, file: Path, trained: Path, tmp_path: Path
) -> None:
    url, known = bucket_server.new_url(), list[bool]()
    writer, reader = (object_store(url, tmp_path / name, MAX_BYTES) for name in ("writer", "reader"))
    preview = writer.add("a", file)
    reader.get("a")
    stored = writer.swap("a", preview.sha256, trained)

    def look(method: str, path: str) -> None:
        if method == "GET" and path.endswith("prompts/a.json"):
            known.append(reader.is_known("a"))

    proxy.choose = look
    assert reader.get("a").sha256 == stored.sha256
    assert known == [True]


def test_what_is_registered_while_a_swap_is_on_its_way_stays(
    locking_server: BucketServer, proxy: FaultyProxy, file: Path, trained: Path, tmp_path: Path
) -> None:
    """The name led to the preview when the swap was sent."""
    url, by_hand = locking_server.new_url(), list[str]()
    store, other = (object_store(url, tmp_path / name, MAX_BYTES) for name in ("one", "other"))
    preview = store.add("a", file)
    upload = write(tmp_path / "by-hand", seed=2)
    assert store.offers.replace

    def replace_first(method: str, path: str) -> None:
        if method == "PUT" and path.endswith("prompts/a.json") and not by_hand:
            by_hand.append("")
            other.remove("a")
            by_hand.append(other.add("a", upload).sha256)

    proxy.choose = replace_first
    with pytest.raises(NameChanged, match="is another one by now"):
        store.swap("a", preview.sha256, trained)
    assert store.get("a").sha256 == by_hand[-1]
    assert store.local_file(store.get("a")).read_bytes() == upload.read_bytes()
    assert len(store.bucket.list("objects/")) == 1
