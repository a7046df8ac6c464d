"""Leased files go with their last user, whoever deletes the soft prompt and whenever a request is given up."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest

from softbatch.prompt_store.manifest import ModelSpec
from softbatch.prompt_store.stores.directory import PromptStore, StoredPrompt
from softbatch.server.request_failures import UnknownSoftPrompt
from softbatch.server.requests.leases import SoftPromptLeases, lease_directory
from tests.support.bucket_server import BucketServer, object_store
from tests.support.faulty_proxy import FaultyProxy
from tests.support.models import make_soft_prompt, save_prompt

SPEC = ModelSpec(name="tiny", fingerprint="ab" * 32, hidden_size=8, num_layers=2, num_kv_heads=1, head_dim=4)


class SlowStore(PromptStore):
    """Leases only when told to."""

    def __init__(self, root: Path) -> None:
        super().__init__(root, 1 << 20)
        self.linking, self.may_link = threading.Event(), threading.Event()

    def lease(self, stored: StoredPrompt, directory: Path) -> Path:
        self.linking.set()
        assert self.may_link.wait(60)
        return super().lease(stored, directory)


@pytest.fixture
def store(tmp_path: Path) -> SlowStore:
    store = SlowStore(tmp_path / "prompts")
    store.add("manual", save_prompt(make_soft_prompt("kv", 4, SPEC), tmp_path, "manual"))
    return store


def leases_of(store: SlowStore, tmp_path: Path, unused: list[str]) -> SoftPromptLeases:
    return SoftPromptLeases(store, SPEC, tmp_path / "leases", unused.append)


def files(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "leases").iterdir())


def test_removed_by_another_process(store: SlowStore, tmp_path: Path) -> None:
    store.may_link.set()
    unused: list[str] = []

    async def scenario() -> None:
        leases = leases_of(store, tmp_path, unused)
        first, second = await leases.acquire("manual"), await leases.acquire("manual")
        PromptStore(store.root, 1 << 20).remove("manual")
        with pytest.raises(UnknownSoftPrompt, match="manual"):
            await leases.acquire("manual")
        leases.release(first)
        assert len(files(tmp_path)) == 1, "the second still uses it"
        leases.release(second)
        assert files(tmp_path) == []
        assert unused == [first.stored.sha256]

    asyncio.run(scenario())


def test_a_request_given_up_while_its_file_is_linked(store: SlowStore, tmp_path: Path) -> None:
    unused: list[str] = []

    async def scenario() -> None:
        leases = leases_of(store, tmp_path, unused)
        request = asyncio.create_task(leases.acquire("manual"))
        await asyncio.to_thread(store.linking.wait, 60)
        request.cancel()
        with pytest.raises(asyncio.CancelledError):
            await request
        store.may_link.set()
        await asyncio.gather(*(task for task in asyncio.all_tasks() if task is not asyncio.current_task()))
        await asyncio.sleep(0)
        assert len(files(tmp_path)) == 1, "kept for the next request, as the soft prompt is registered"
        store.remove("manual")
        await leases.release_deleted()
        assert files(tmp_path) == []
        assert len(unused) == 1

    asyncio.run(scenario())


def test_a_store_that_is_read_only_has_its_leases_elsewhere() -> None:
    """Not even root makes a directory there."""
    with lease_directory(Path("/sys/kernel")) as directory:
        assert directory.is_dir()
        assert Path("/sys") not in directory.parents
    assert not directory.exists()


def test_a_bucket_has_no_file_leased_that_nobody_uses(bucket_server: BucketServer, tmp_path: Path) -> None:
    """Its copies are bounded; the engine is told when a soft prompt is deleted all the same."""
    url, unused = bucket_server.new_url(), list[str]()
    store = object_store(url, tmp_path / "copies", 1 << 20)
    stored = store.add("manual", save_prompt(make_soft_prompt("kv", 4, SPEC), tmp_path, "manual"))

    async def scenario() -> None:
        leases = SoftPromptLeases(store, SPEC, tmp_path / "leases", unused.append)
        first, second = await leases.acquire("manual"), await leases.acquire("manual")
        leases.release(first)
        assert len(files(tmp_path)) == 1
        object_store(url, tmp_path / "elsewhere", 1 << 20).remove("manual")
        assert len(files(tmp_path)) == 1, "it is served to its end"
        leases.release(second)
        assert files(tmp_path) == []
        assert unused == []
        with pytest.raises(UnknownSoftPrompt):
            await leases.acquire("manual")
        assert unused == [stored.sha256]

    asyncio.run(scenario())


def test_a_store_that_cannot_be_listed_fails_nobody(
    bucket_server: BucketServer, proxy: FaultyProxy, tmp_path: Path
) -> None:
    """A deletion has happened all the same, and a name that is gone is gone."""
    url, unused = bucket_server.new_url(), list[str]()
    store = object_store(url, tmp_path / "copies", 1 << 20)
    stored = store.add("manual", save_prompt(make_soft_prompt("kv", 4, SPEC), tmp_path, "manual"))

    async def scenario() -> None:
        leases = SoftPromptLeases(store, SPEC, tmp_path / "leases", unused.append)
        leases.release(await leases.acquire("manual"))
        store.remove("manual")
        proxy.choose = lambda method, path: "denied" if "list-type" in path else None
        await leases.release_deleted()
        with pytest.raises(UnknownSoftPrompt):
            await leases.acquire("manual")
        assert proxy.done["denied"]
        assert unused == [stored.sha256], "what this process deleted itself it knows without a list"

    asyncio.run(scenario())


def test_a_request_at_the_moment_of_a_swap_gets_the_trained_one(store: SlowStore, tmp_path: Path) -> None:
    """Its preview was swapped between looking and linking; one that began before goes on with the preview."""
    other, unused = PromptStore(store.root, 1 << 20), list[str]()
    trained = save_prompt(make_soft_prompt("kv", 4, SPEC, seed=1), tmp_path, "trained")

    async def scenario() -> None:
        preview = other.get("manual").sha256
        leases = leases_of(store, tmp_path, unused)
        request = asyncio.create_task(leases.acquire("manual"))
        await asyncio.to_thread(store.linking.wait, 60)
        stored = other.swap("manual", preview, trained)
        store.may_link.set()
        first = await request
        assert first.stored.sha256 == stored.sha256 == first.ref.sha256
        again = other.swap("manual", stored.sha256, save_prompt(make_soft_prompt("kv", 4, SPEC), tmp_path, "again"))
        second = await leases.acquire("manual")
        assert second.stored.sha256 == again.sha256
        assert unused == [], "the first still uses it"
        leases.release(first)
        assert unused == [stored.sha256]
        leases.release(second)

    asyncio.run(scenario())
