"""A process killed at any moment of an add leaves the registry whole."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

from softbatch.prompt_store.soft_prompt_file import SoftPrompt, load, save
from softbatch.prompt_store.stores.directory import PromptStore, UnknownPrompt
from tests.support.prompt_store_writer import MAX_BYTES, add_many
from tests.support.soft_prompt_samples import SPEC, manifest, soft_prompt

ROUNDS = 40


def test_sigkill_during_adds_leaves_nothing_partial(tmp_path: Path) -> None:
    root = tmp_path / "store"
    uploads = [tmp_path / "small", tmp_path / "large"]
    save(soft_prompt("kv"), uploads[0])
    large = soft_prompt(n=60_000).tensors["embeddings"]
    save(SoftPrompt(manifest(n=len(large)), embeddings=large), uploads[1])
    # Forked from a fresh server process: this one's torch threads would not survive a fork.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["softbatch.prompt_store.stores.directory"])
    moments = random.Random(0)
    left_behind = 0
    seen_alive: set[str] = set()
    for round_number in range(ROUNDS):
        ready = context.Event()
        child = context.Process(target=add_many, args=(root, uploads, f"r{round_number}", ready), daemon=True)
        child.start()
        try:
            assert ready.wait(60)
            watcher = PromptStore(root, MAX_BYTES)
            until = time.monotonic() + moments.uniform(0.0, 0.1)
            # The first child lives until it has added something, however slow the disk is.
            while time.monotonic() < until or (not seen_alive and time.monotonic() < until + 60):
                assert watcher.broken() == [], "a file is seen whole or not at all while it is being added"
                for stored in watcher.list():
                    if stored.name not in seen_alive:
                        seen_alive.add(stored.name)
                        with contextlib.suppress(UnknownPrompt):  # the child removes some
                            load(watcher.lease(stored, tmp_path / "leases"), MAX_BYTES)
        finally:
            child.kill()
            child.join()
        assert child.exitcode == -signal.SIGKILL
        left_behind += sum(name.startswith(".") for name in os.listdir(root))

        store = PromptStore(root, MAX_BYTES)
        assert [name for name in os.listdir(root) if name.startswith(".")] == []
        assert store.broken() == []
        for stored in store.list():
            prompt = load(stored.path, MAX_BYTES)
            assert prompt.manifest == stored.manifest
            assert prompt.manifest.model.name == SPEC.name
        for stored in store.list()[2:]:
            store.remove(stored.name)
    assert left_behind > 0, "no kill fell into an add: nothing was tested"
    assert seen_alive
