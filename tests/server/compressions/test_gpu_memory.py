"""A compression for which the GPU has no memory says so in one line, on the command line and over HTTP."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from softbatch.prompt_store.compression.compression_settings import CompressionSettings
from softbatch.scheduler.model.source import EMBEDDED_ALIAS, ModelError
from softbatch.server.compressions import run
from softbatch.server.compressions.prepare import ModelFiles, PreparedRun
from softbatch.server.compressions.request import CompressionRequest, ModelChoice
from softbatch.server.compressions.worker import _failure


def test_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def no_room(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nMore lines")

    monkeypatch.setattr(run.CompressionSession, "open", no_room)
    request = CompressionRequest(
        name="guide",
        context="A text.",
        settings=CompressionSettings(),
        questions=[],
        choice=ModelChoice(EMBEDDED_ALIAS),
        store=str(tmp_path),
        max_prompt_bytes=1 << 20,
    )
    with pytest.raises(ModelError, match="--gpu-memory-utilization") as refused:
        run.run_compression(
            PreparedRun.of(request, ModelFiles.open(request.choice)),
            tmp_path / "guide",
            False,
            lambda _: None,
            lambda: False,
        )
    assert "--gpu-memory-utilization" in _failure(refused.value).message
