"""A tiny model whose window holds the context, a context of a few sentences, and the commands as functions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from softbatch.server.cli.main import main

CONTEXT = (
    "# Harbour office\n\nThe harbour office opens at seven. Ring the brass bell twice before you enter.\n"
    "Boats longer than 12 metres pay 30 crowns a night. Red flags mean that no boat may leave.\n"
)
VIRTUAL_TOKENS = 8
Run = Callable[..., int]


@pytest.fixture(scope="session")
def tiny_path(tiny_compressible: str) -> str:
    return tiny_compressible


@pytest.fixture
def context_file(tmp_path: Path) -> Path:
    path = tmp_path / "harbour.md"
    path.write_text(CONTEXT, encoding="utf-8")
    return path


@pytest.fixture
def command(tiny_path: str, tmp_path: Path) -> Run:
    """`command(name, *flags)`: the status of `softbatch name …` on the tiny model and a store of the test's own."""

    def run(name: str, *flags: str | Path) -> int:
        # Of a flag given twice the last counts: the test's own.
        return main([name, *model_flags(tiny_path, tmp_path / "store"), *map(str, flags)])

    return run


def model_flags(path: str, store: Path) -> list[str]:
    return ["--model", path, "--dtype", "float32", "--prompt-store", str(store)]
