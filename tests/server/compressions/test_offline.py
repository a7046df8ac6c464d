"""`softbatch.compress` registers a soft prompt without a server and without the command line."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

import softbatch
from softbatch.prompt_store.compression.progress import Progress
from softbatch.server.compressions.request import InputError
from tests.server.compressions.conftest import OPENED_ONCE, VIRTUAL_TOKENS


def test_compress_registers_a_soft_prompt(
    tiny_path: str, context_file: Path, tmp_path: Path, counted: Counter[str]
) -> None:
    store = softbatch.PromptStore(tmp_path / "store", 1 << 30)
    phases: list[str] = []
    registered: list[str | None] = []

    def on_progress(progress: Progress) -> None:
        phases.append(progress.phase)
        registered.extend(found.manifest.preview_of for found in store.list() if progress.phase == "training")

    stored = softbatch.compress(
        context_file,
        "harbour",
        store,
        tiny_path,
        dtype="float32",
        device="cpu",
        virtual_tokens=VIRTUAL_TOKENS,
        steps=2,
        answer_tokens=6,
        preview=True,
        on_progress=on_progress,
    )
    assert counted == OPENED_ONCE
    assert store.get("harbour").sha256 == stored.sha256
    assert stored.manifest.num_virtual_tokens == VIRTUAL_TOKENS
    assert {"self_study", "gold", "teacher", "training", "evaluation"} <= set(phases)
    assert "kl_closed" in stored.manifest.fidelity
    assert None not in registered
    assert len(set(registered)) == 1
    assert stored.manifest.preview_of is None


def test_what_cannot_be_compressed_is_refused_before_any_work(tiny_path: str, tmp_path: Path) -> None:
    store = softbatch.PromptStore(tmp_path / "store", 1 << 30)
    with pytest.raises(InputError, match="the context is empty"):
        softbatch.compress(" ", "harbour", store, tiny_path, virtual_tokens=VIRTUAL_TOKENS, steps=1)
    with pytest.raises(InputError, match="virtual tokens are more than"):
        softbatch.compress("A text.", "harbour", store, tiny_path, virtual_tokens=500, steps=1)
    assert not store.list()
