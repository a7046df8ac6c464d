"""The pages say what the code says: reference pages are fresh, and what they name exists."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*(ROOT / "docs").rglob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"])
# A path of the repository, from a room on; not one that is part of a longer path or of an address.
NAMED_PATH = re.compile(
    r"(?<![\w./-])(?:server|scheduler|prompt_store|tests|benchmarks|docs|examples)/[\w./-]*[\w/]", re.ASCII
)
FLAGS_OF_SCRIPTS = {"--device", "--parts"}  # of benchmarks.gpu.gpu
LINK = re.compile(r"\]\((?!https?://|#)([^)#\s]+)")


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    found = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pages(generator: ModuleType) -> dict[str, str]:
    made: dict[str, str] = generator.pages()
    return made


def test_reference_pages_are_fresh(pages: dict[str, str]) -> None:
    for name, text in pages.items():
        page = ROOT / "docs" / "reference" / name
        assert page.read_text() == text, f"{page} is stale: run make docs-reference"


def test_reference_names_what_a_client_meets(generator: ModuleType, pages: dict[str, str]) -> None:
    """The generator finds what it is made for, in each of the forms in which the code names it."""
    for command in ("serve", "compress", "evaluate", "score", "prompts import", "bench"):
        assert f"## softbatch {command}\n" in pages["cli.md"]
    assert "`--max-batch-size N`" in pages["cli.md"]
    assert "## POST /v1/chat/completions\n" in pages["http-api.md"]
    assert "`softbatch_preemptions_total`" in pages["metrics.md"]
    assert "`softbatch_compression_jobs`" in pages["metrics.md"]
    codes = {"unavailable", "starting", "model_not_found", "wrong_model", "no_chat_template", "context_length_exceeded"}
    assert codes <= generator.error_codes()


def test_the_guide_shows_every_client() -> None:
    """As lines that mkdocs takes for the names of files, which a formatter may have spoilt."""
    shown = re.findall(
        r'^--8<-- "tests/clients/(.+)"$', (ROOT / "docs" / "guides" / "clients.md").read_text(), re.MULTILINE
    )
    assert sorted(shown) == sorted(path.name for path in (ROOT / "tests" / "clients").glob("test_*.py"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_named_paths_exist(page: Path) -> None:
    for path in NAMED_PATH.findall(page.read_text()):
        assert (ROOT / path).exists(), f"{page.name} names {path}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_named_metrics_and_flags_exist(page: Path) -> None:
    """Results and the lab log also name flags of other programs, and of earlier versions."""
    if page.parent.name in {"results", "lab"}:
        return
    metrics, commands = ((ROOT / "docs" / "reference" / name).read_text() for name in ("metrics.md", "cli.md"))
    text = page.read_text()
    for metric in re.findall(r"\bsoftbatch_[a-z_]+[a-z]\b", text):
        assert f"`{metric}`" in metrics, f"{page.name} names {metric}"
    for flag in re.findall(r"`(--[a-z][a-z-]+)", text):
        assert f"`{flag}" in commands or flag in FLAGS_OF_SCRIPTS, f"{page.name} names {flag}"
