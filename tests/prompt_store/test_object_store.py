"""What only a bucket has: how often it is asked, its bounded copies, what it does not offer, damage of all kinds."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from softbatch.prompt_store.soft_prompt_file import SoftPromptError
from softbatch.prompt_store.stores.bucket import (
    PROBES,
    Bucket,
    BucketAddressError,
    BucketDenied,
    BucketError,
    Offers,
    Retries,
)
from softbatch.prompt_store.stores.bucket_files import S3Files, _plain_checksums
from softbatch.prompt_store.stores.kept_text import KeptText
from softbatch.prompt_store.stores.object_store import ObjectStore
from softbatch.prompt_store.stores.store import NameTaken, StoredPrompt, UnknownPrompt
from tests.support.bucket_server import NAME, QUICK, BucketServer, object_store
from tests.support.faulty_proxy import Fault, FaultyProxy
from tests.support.killed_calls import killed_before_call
from tests.support.soft_prompt_samples import MAX_BYTES, names, write

KEPT = KeptText(text="The office opens at seven.", recall=3)


@pytest.fixture
def url(bucket_server: BucketServer) -> str:
    return bucket_server.new_url()


def content_key(store: ObjectStore) -> str:
    (found,) = (found.key for found in store.bucket.list("objects/"))
    return found


def test_what_is_known_is_served_without_the_bucket(url: str, proxy: FaultyProxy, file: Path, tmp_path: Path) -> None:
    object_store(url, tmp_path / "writer", MAX_BYTES).add("a", file, kept=KEPT)
    before = proxy.asked["GET"]
    reader = object_store(url, tmp_path / "reader", MAX_BYTES, refresh=60)
    stored = reader.get("a")
    for number in range(3):
        reader.lease(stored, tmp_path / f"leases{number}")
        reader.kept_text(stored)
    asked = dict(proxy.asked)
    for _ in range(20):
        assert reader.get("a") == stored
        reader.open("a")[1].close()
        assert reader.kept_text(stored) == KEPT
    assert dict(proxy.asked) == asked
    assert asked["GET"] - before == 3, "a record, a content and a text"


def test_a_listing_reads_only_records_that_changed(url: str, proxy: FaultyProxy, tmp_path: Path) -> None:
    writer = object_store(url, tmp_path / "writer", MAX_BYTES)
    for number in range(5):
        writer.add(f"p{number}", write(tmp_path / "upload", seed=number))
    reader = object_store(url, tmp_path / "reader", MAX_BYTES)
    assert len(reader.list()) == 5
    asked = proxy.asked["GET"]
    assert len(reader.list()) == 5
    assert proxy.asked["GET"] == asked + 1
    writer.add("q", write(tmp_path / "upload", seed=9))
    asked = proxy.asked["GET"]
    assert len(reader.list()) == 6
    assert proxy.asked["GET"] == asked + 2


def test_names_of_others_are_seen_within_a_refresh(url: str, file: Path, tmp_path: Path) -> None:
    writer = object_store(url, tmp_path / "writer", MAX_BYTES)
    reader = object_store(url, tmp_path / "reader", MAX_BYTES, refresh=0.3)
    with pytest.raises(UnknownPrompt):
        reader.get("a")
    writer.add("a", file)
    time.sleep(0.3)
    before = reader.changed_at()
    leased = reader.lease(reader.get("a"), tmp_path / "leases")
    writer.remove("a")
    time.sleep(0.3)
    with pytest.raises(UnknownPrompt):
        reader.get("a")
    assert reader.list() == []
    assert reader.changed_at() > before
    assert leased.read_bytes() == file.read_bytes(), "whoever uses it goes on"
    assert not reader.is_known("a")


def test_copies_are_bounded_and_what_is_in_use_stays(url: str, tmp_path: Path) -> None:
    writer = object_store(url, tmp_path / "writer", MAX_BYTES)
    stored = [writer.add(f"p{number}", write(tmp_path / "upload", seed=number)) for number in range(6)]
    size = stored[0].num_bytes
    reader = object_store(url, tmp_path / "reader", MAX_BYTES, cache_bytes=3 * size)
    leased = reader.lease(stored[0], tmp_path / "leases")
    for prompt in stored[1:]:
        assert reader.local_file(prompt).stat().st_size == size
    kept = {path.name.removesuffix(".safetensors") for path in (reader.root / "objects").iterdir()}
    assert kept == {prompt.sha256 for prompt in (stored[0], stored[4], stored[5])}
    leased.unlink()
    reader.local_file(stored[1])
    reader.local_file(stored[2])
    assert len(list((reader.root / "objects").iterdir())) == 3


def test_a_copy_damaged_on_disk_is_fetched_again(url: str, file: Path, tmp_path: Path) -> None:
    store = object_store(url, tmp_path / "one", MAX_BYTES)
    path = store.local_file(store.add("a", file))
    path.chmod(0o600)
    path.write_bytes(b"x" * path.stat().st_size)
    again = object_store(url, tmp_path / "one", MAX_BYTES)
    assert again.local_file(again.get("a")).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
def test_a_damaged_object_is_named_and_refused(url: str, file: Path, tmp_path: Path, damage: str) -> None:
    writer = object_store(url, tmp_path / "writer", MAX_BYTES)
    writer.add("a", file)
    key = content_key(writer)
    content = file.read_bytes()
    if damage == "gone":
        writer.bucket.delete(key)
    else:
        writer.bucket.write(key, content[:-5] if damage == "cut" else content[:-1] + bytes([content[-1] ^ 1]))
    reader = object_store(url, tmp_path / "reader", MAX_BYTES)
    stored = reader.get("a")
    with pytest.raises(SoftPromptError, match=key):
        reader.lease(stored, tmp_path / "leases")
    with pytest.raises(SoftPromptError, match=key):
        reader.open("a")
    assert reader.list() == []
    assert [name for name, _ in reader.broken()] == ["a"]
    reader.remove("a")
    assert reader.bucket.list("") == []
    assert reader.add("a", file).sha256 == stored.sha256


@pytest.mark.parametrize("content", [b"", b"{}", b"0" * 64 + b'\n{"name": "a"}'])
def test_a_damaged_record_is_broken_and_harms_no_other(url: str, file: Path, tmp_path: Path, content: bytes) -> None:
    store = object_store(url, tmp_path / "one", MAX_BYTES)
    good = store.add("good", file)
    store.bucket.write("prompts/bad.json", content)
    store.bucket.write("prompts/a b.json", content)
    moved = store.bucket.read("prompts/good.json")
    assert moved is not None
    store.bucket.write("prompts/moved.json", moved[0])
    assert store.list() == [good]
    assert [name for name, _ in store.broken()] == ["a b", "bad", "moved"]
    with pytest.raises(SoftPromptError, match=r"prompts/bad\.json") as caught:
        store.get("bad")
    assert not isinstance(caught.value, UnknownPrompt)
    store.remove("bad")
    assert "bad" not in dict(store.broken())


FAULTS: tuple[Fault, ...] = ("slow", "500", "reset", "truncate", "flip", "garble", "lost")


@pytest.mark.parametrize("fault", FAULTS)
def test_nothing_wrong_is_ever_served(
    url: str, bucket_server: BucketServer, proxy: FaultyProxy, file: Path, tmp_path: Path, fault: Fault
) -> None:
    """Every second request fails; what comes through all the same is right, and what does not says so."""
    draw = random.Random(fault)
    writer = object_store(url, tmp_path / "writer", MAX_BYTES)
    assert writer.offers == bucket_server.offers
    proxy.choose = lambda method, path: fault if draw.random() < (0.3 if fault == "slow" else 0.5) else None
    content = file.read_bytes()
    named: list[bool] = []
    served = 0
    for number in range(3):
        name = f"p{number}"
        try:
            writer.add(name, file, kept=KEPT)
        except BucketError:  # but never NameTaken: nobody else was there
            continue
        reader = object_store(url, tmp_path / f"reader{number}", MAX_BYTES)
        try:
            stored, opened = reader.open(name)
            with opened:
                assert opened.read() == content
            assert stored.name == name
            served += 1
            assert reader.kept_text(stored) in (KEPT, None)
            assert {found.sha256 for found in reader.list()} <= {stored.sha256}
        except (BucketError, SoftPromptError) as error:
            named.append(any(part in str(error) for part in ("prompts/", "objects/", "texts/")))
    assert all(named)
    assert served, "tries are for something"
    assert proxy.done[fault] > 5
    proxy.choose = lambda method, path: None
    fresh = object_store(url, tmp_path / "fresh", MAX_BYTES)
    assert fresh.broken() == []
    for stored in fresh.list():
        assert fresh.local_file(stored).read_bytes() == content


def test_known_names_outlast_an_outage_and_others_are_an_error(
    url: str, proxy: FaultyProxy, file: Path, tmp_path: Path
) -> None:
    store = object_store(url, tmp_path / "one", MAX_BYTES)
    stored = store.add("a", file)
    assert names(store) == ["a"]
    proxy.choose = lambda method, path: "reset"
    assert store.get("a") == stored
    assert store.local_file(stored).read_bytes() == file.read_bytes()
    with pytest.raises(BucketError, match=r"cannot read .*prompts/b\.json"):
        store.get("b")


@pytest.mark.parametrize("fault", ["denied", "500"])
def test_names_outlast_an_outage_that_says_denied(
    url: str, proxy: FaultyProxy, file: Path, tmp_path: Path, fault: Fault
) -> None:
    """As 403 does of a token that has run out, or a clock that is wrong; and after a name of this server's own."""
    store = object_store(url, tmp_path / "one", MAX_BYTES)
    stored = store.add("a", file)
    assert store.list() == [stored]
    store.add("b", file)
    store.remove("b")
    proxy.choose = lambda method, path: fault
    assert store.get("a") == stored
    asked = sum(proxy.asked.values())
    assert store.list() == [stored]
    assert sum(proxy.asked.values()) - asked <= 2, "nobody waits for all tries where there is a list"
    with pytest.raises((BucketDenied, BucketError)):
        store.get("b")


def test_a_record_that_may_not_be_read_hides_no_other(url: str, proxy: FaultyProxy, file: Path, tmp_path: Path) -> None:
    writer = object_store(url, tmp_path / "writer", MAX_BYTES)
    for name in "ab":
        writer.add(name, file)
    proxy.choose = lambda method, path: "denied" if path.endswith("prompts/a.json") else None
    reader = object_store(url, tmp_path / "reader", MAX_BYTES)
    assert names(reader) == ["b"]
    assert [name for name, _ in reader.broken()] == ["a"]
    proxy.choose = lambda method, path: None
    assert names(reader) == ["a", "b"]


def test_one_failed_look_does_not_hide_a_deletion(url: str, proxy: FaultyProxy, file: Path, tmp_path: Path) -> None:
    writer = object_store(url, tmp_path / "writer", MAX_BYTES)
    reader = object_store(url, tmp_path / "reader", MAX_BYTES)
    writer.add("a", file)
    reader.get("a")
    writer.remove("a")
    proxy.choose = lambda method, path: None if proxy.done["500"] else "500"
    with pytest.raises(UnknownPrompt):
        reader.get("a")


def test_an_answer_that_never_comes_is_given_up(url: str, proxy: FaultyProxy, tmp_path: Path) -> None:
    bucket = Bucket(url, Retries(tries=2, seconds=0.1, first_pause=0.01))
    proxy.choose = lambda method, path: "slow"
    with pytest.raises(BucketError, match="2 tries"):
        bucket.read("a")


def test_a_store_without_conditional_writes_says_so(
    file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = Bucket(f"memory://{tmp_path.name}/p", QUICK)
    plain = type(bucket._files)
    monkeypatch.setattr(plain, "create", plain.write)
    store = ObjectStore(bucket, tmp_path / "one", MAX_BYTES, 1 << 30, 0)
    with caplog.at_level(logging.WARNING):
        store.sweep()
    assert "no conditional writes" in caplog.text
    store.add("a", file)
    with pytest.raises(NameTaken):
        store.add("a", file)
    assert len(store.list()) == 1


@pytest.mark.parametrize("decides", ["when it ends", "when it begins", "sometimes when it begins"])
def test_a_store_that_looks_at_the_condition_when_a_write_begins_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decides: str
) -> None:
    """Whoever comes later is refused, and all who come at once are told that they were first."""
    bucket = Bucket(f"memory://{tmp_path.name}/p", QUICK)
    plain, together, one_at_a_time = type(bucket._files), threading.Barrier(4), threading.Lock()
    create = plain.create

    def begin_and_end(self: Any, key: str, content: bytes, seconds: float) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.etag(key, seconds)
            raise FileExistsError(key)
        if key.endswith("-rivals") and (decides == "when it begins" or key.endswith("-2-rivals")):
            together.wait(60)
        elif key.endswith("-rivals"):
            end(self, key, content, seconds)
            return
        self.write(key, content, seconds)

    def end(self: Any, key: str, content: bytes, seconds: float) -> None:
        with one_at_a_time:
            create(self, key, content, seconds)

    monkeypatch.setattr(plain, "create", end if decides == "when it ends" else begin_and_end)
    assert bucket.probe() == Offers(create=decides == "when it ends", replace=False)
    assert bucket.list("") == []


def test_what_crashes_left_goes_in_time(url: str, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = object_store(url, tmp_path / "one", MAX_BYTES)
    store.add("a", file, kept=KEPT)
    store.stage("b", file, kept=KEPT)
    store.stage("a.b", file)
    store.bucket.write(f"{PROBES}0123", b"1")
    store.remove_stale()
    assert len(store.bucket.list("")) == 7, "another machine may be about to give it a name"
    monkeypatch.setattr("softbatch.prompt_store.stores.bucket_sweep.STALE_SECONDS", -60.0)
    store.remove_stale()
    assert {found.key.split("/")[1].removesuffix(".json") for found in store.bucket.list("")} == {"a"}
    assert store.kept_text(store.get("a")) == KEPT


def test_addresses_that_cannot_be(bucket_server: BucketServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for url, said in (("nonsense://x/y", "no kind of object store"), ("s3://", "name a bucket")):
        with pytest.raises(BucketAddressError, match=said):
            Bucket(url)
    with pytest.raises(BucketAddressError, match="take the password out") as refused:
        Bucket("s3://me:secret@bucket/p")
    assert "secret" not in str(refused.value)
    with pytest.raises(BucketAddressError, match="no such bucket"):
        object_store("s3://nobody-made-this/p", tmp_path / "one", MAX_BYTES).sweep()
    monkeypatch.setitem(__import__("sys").modules, "s3fs", None)
    with pytest.raises(BucketAddressError, match=r"pip install 'softbatch\[s3\]'"):
        Bucket(f"s3://{NAME}/p")


def test_a_directory_of_copies_is_private(url: str, file: Path, tmp_path: Path) -> None:
    store = object_store(url, tmp_path / "one", MAX_BYTES)
    store.kept_text(store.add("a", file, kept=KEPT))
    assert os.stat(store.root).st_mode & 0o077 == 0


@pytest.mark.parametrize("how", ["here", "seen", "listed", "while away"])
def test_a_text_goes_from_this_machine_with_its_name(url: str, file: Path, tmp_path: Path, how: str) -> None:
    writer = object_store(url, tmp_path / "writer", MAX_BYTES)
    writer.add("a", file, kept=KEPT)
    reader = object_store(url, tmp_path / "reader", MAX_BYTES)
    stored = reader.get("a")
    leased = reader.lease(stored, tmp_path / "leases")
    assert reader.kept_text(stored) == KEPT
    (reader if how == "here" else writer).remove("a")
    if how == "seen":
        with pytest.raises(UnknownPrompt):
            reader.get("a")
    elif how == "listed":
        assert reader.list() == []
    elif how == "while away":
        object_store(url, tmp_path / "reader", MAX_BYTES).drop_unnamed()
    assert list((reader.root / "objects").iterdir()) == []
    assert leased.read_bytes() == file.read_bytes(), "whoever uses it goes on"


def test_a_text_of_two_names_stays_with_the_second(url: str, file: Path, tmp_path: Path) -> None:
    store = object_store(url, tmp_path / "one", MAX_BYTES)
    for name in "ab":
        assert store.kept_text(store.add(name, file, kept=KEPT)) == KEPT
    store.remove("a")
    assert len(list((store.root / "objects").iterdir())) == 2
    store.drop_unnamed()
    assert store.kept_text(store.get("b")) == KEPT


@pytest.mark.parametrize("damage", ["flipped", "gone", "newer"])
def test_a_damaged_text_is_named_and_asked_for_once(
    url: str, proxy: FaultyProxy, file: Path, tmp_path: Path, damage: str
) -> None:
    """A request that wants passages must not be answered without them."""
    writer = object_store(url, tmp_path / "writer", MAX_BYTES)
    newer = KeptText(text=KEPT.text, recall=3, format_version=9)
    writer.add("a", file, kept=newer if damage == "newer" else KEPT)
    (key,) = (found.key for found in writer.bucket.list("texts/"))
    if damage == "gone":
        writer.bucket.delete(key)
    elif damage == "flipped":
        writer.bucket.write(key, b"{}")
    reader = object_store(url, tmp_path / "reader", MAX_BYTES)
    stored = reader.get("a")
    with pytest.raises(SoftPromptError, match=key):
        reader.kept_text(stored)
    asked = proxy.asked["GET"]
    with pytest.raises(SoftPromptError, match=key):
        reader.kept_text(stored)
    assert proxy.asked["GET"] == asked
    assert reader.list() == [stored], "it serves requests without passages"
    writer.remove("a")
    reader.list()
    with pytest.raises(UnknownPrompt):
        reader.kept_text(stored)


def test_a_deletion_takes_nothing_from_who_registers_meanwhile(
    url: str, proxy: FaultyProxy, file: Path, tmp_path: Path
) -> None:
    """Its first try fails; before the next one another has deleted the name, and registered it anew."""
    other = object_store(url, tmp_path / "other", MAX_BYTES)
    store = object_store(url, tmp_path / "one", MAX_BYTES)
    old = store.add("a", file)
    upload = write(tmp_path / "upload", seed=7)
    registered, began = list[StoredPrompt](), threading.Event()

    def choose(method: str, path: str) -> Fault | None:
        if method != "DELETE" or began.is_set():
            return None
        began.set()
        other.remove("a")
        registered.append(other.add("a", upload))
        return "500"

    proxy.choose = choose
    store.remove("a")
    proxy.choose = lambda method, path: None
    assert store.get("a").version == registered[0].version
    assert registered[0].sha256 != old.sha256
    assert store.local_file(store.get("a")).read_bytes() == upload.read_bytes()


def test_a_process_killed_at_any_call_leaves_a_name_whole_or_free(url: str, file: Path, tmp_path: Path) -> None:
    outcomes, is_killed, last = set[tuple[str, ...]](), True, 0
    offers = Bucket(url, QUICK).probe()
    while is_killed:
        store = object_store(f"{url}/{last}", tmp_path / f"one{last}", MAX_BYTES)
        store.offers = offers
        with killed_before_call(last) as fate:
            store.add("a", file, kept=KEPT)
        is_killed, last = fate.is_killed, last + 1
        other = object_store(store.location, tmp_path / f"other{last}", MAX_BYTES)
        other.offers = offers
        assert other.broken() == []
        outcomes.add(tuple(names(other)))
        if not other.list():
            other.add("a", file, kept=KEPT)
        stored = other.get("a")
        assert other.local_file(stored).read_bytes() == file.read_bytes()
        assert other.kept_text(stored) == KEPT
    assert outcomes == {(), ("a",)}


def test_whoever_may_only_read_serves_and_is_told(
    url: str, proxy: FaultyProxy, file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    object_store(url, tmp_path / "writer", MAX_BYTES).add("a", file)
    proxy.choose = lambda method, path: "denied" if method in ("PUT", "DELETE") else None
    store = object_store(url, tmp_path / "reader", MAX_BYTES)
    with caplog.at_level(logging.WARNING):
        store.sweep()
    assert "is read-only" in caplog.text
    assert store.local_file(store.get("a")).read_bytes() == file.read_bytes()
    with pytest.raises(BucketDenied, match=r"objects/b/.*access denied"):
        store.add("b", file)
    with pytest.raises(BucketDenied, match="access denied"):
        store.remove("a")


def test_a_store_that_refuses_conditions_says_so_and_is_written_to(
    url: str, proxy: FaultyProxy, file: Path, tmp_path: Path
) -> None:
    """As Swift's S3 API does."""
    proxy.refuses_conditions = True
    store = object_store(url, tmp_path / "one", MAX_BYTES)
    assert store.offers == Offers(create=False, replace=False)
    stored = store.add("a", file)
    with pytest.raises(NameTaken):
        store.add("a", file)
    assert store.list() == [stored]
    swapped = store.swap("a", stored.sha256, write(tmp_path / "upload", seed=7))
    assert store.list() == [swapped]
    garbled: Iterator[Fault] = iter(["garble"])
    proxy.choose = lambda method, path: next(garbled, None) if method == "PUT" else None
    store.bucket.write("texts/a", b"whole")
    found = store.bucket.read("texts/a")
    assert found is not None
    assert found[0] == b"whole"


def test_how_if_match_is_written_counts_from_before_the_call_and_is_learnt_behind_it(
    locking_server: BucketServer, url: str, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other threads learn it at the same moment: what was sent with quotes is no conflict for that."""
    proxy.compares_unquoted = True
    bucket = Bucket(url, QUICK)
    files, known_before, learnt_meanwhile = bucket._files, list[bool](), [True, False]
    assert isinstance(files, S3Files)
    call_s3 = files._system.call_s3

    def call(name: str, **fields: Any) -> Any:
        condition = fields.get("IfMatch", "")
        if condition and '"' not in condition:
            known_before.append(files._is_unquoted)
        elif condition:
            files._is_unquoted = learnt_meanwhile.pop(0)
        return call_s3(name, **fields)

    monkeypatch.setattr(files._system, "call_s3", call)
    for _ in range(2):
        files._is_unquoted = False
        bucket.write("a", b"1")
        found = bucket.read("a")
        assert found is not None
        assert bucket.replace("a", b"2", found[1]) is not None
    assert files._is_unquoted
    assert known_before[-1] is False


def test_checksums_that_somebody_wants_are_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("botocore")
    monkeypatch.delenv("AWS_REQUEST_CHECKSUM_CALCULATION", raising=False)
    assert _plain_checksums() == {"request_checksum_calculation": "when_required"}
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_supported")
    assert _plain_checksums() == {}


def test_a_store_that_compares_without_quotes_keeps_conditions(
    locking_server: BucketServer, url: str, proxy: FaultyProxy
) -> None:
    """As older Cephs do."""
    proxy.compares_unquoted = True
    bucket = Bucket(url, QUICK)
    assert bucket.probe() == Offers(create=True, replace=True)
    bucket.write("a", b"1")
    found = bucket.read("a")
    assert found is not None
    changed = bucket.replace("a", b"2", found[1])
    assert changed is not None
    assert bucket.replace("a", b"3", found[1]) is None
    assert bucket.read("a") == (b"2", changed)
