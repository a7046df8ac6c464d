"""A tiny model whose window holds the context, a context of a few sentences, and the commands as functions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from softbatch.scheduler.model import loader
from softbatch.server.cli.main import main
from softbatch.server.compressions import prepare

CONTEXT = (
    "# Harbour office\n\nThe harbour office opens at seven. Ring the brass bell twice before you enter.\n"
    "Boats longer than 12 metres pay 30 crowns a night. Red flags mean that no boat may leave.\n"
)
VIRTUAL_TOKENS = 8
Run = Callable[..., int]
OPENED_ONCE = {"resolved": 1, "tokenizers": 1, "tokenised": 1}


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


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often a model was resolved, a tokenizer read and the context tokenised."""
    counts: Counter[str] = Counter()
    resolve, read, encode = prepare.resolve, AutoTokenizer.from_pretrained, PreTrainedTokenizerBase.encode

    def counting(name: str, function: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            counts[name] += 1
            return function(*arguments, **named)

        return call

    def encoding(self: Any, text: str, *arguments: Any, **named: Any) -> Any:
        counts["tokenised"] += CONTEXT in text
        return encode(self, text, *arguments, **named)

    for module in (prepare, loader):
        monkeypatch.setattr(module, "resolve", counting("resolved", resolve))
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", counting("tokenizers", read))
    monkeypatch.setattr(PreTrainedTokenizerBase, "encode", encoding)
    return counts
