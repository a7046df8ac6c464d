"""GGUF files that cannot be converted are refused in a line, and leave nothing in the cache."""

from __future__ import annotations

from pathlib import Path

import pytest

from softbatch.scheduler.model.source import ModelError, _embedded_gguf, resolve


@pytest.mark.parametrize("content", ["text", "cut off"])
def test_a_broken_gguf_file(content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "broken.gguf"
    with _embedded_gguf().open("rb") as whole:
        file.write_bytes(b"no model" * 100 if content == "text" else whole.read(1 << 20))
    with pytest.raises(ModelError, match=r"--model broken.gguf: (not a whole GGUF file|the file ends at)") as refused:
        resolve(str(file))
    assert "\n" not in str(refused.value)
    assert list((tmp_path / "cache").rglob("*.safetensors")) == []
