"""Imports point down only: server → scheduler → prompt_store; and the scheduler's own files stay free of torch."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ABOVE = {"prompt_store": {"scheduler", "server"}, "scheduler": {"server"}, "server": set()}


def imported(path: Path) -> set[str]:
    """Top-level packages that a file imports anywhere, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.removeprefix("softbatch.").split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module.removeprefix("softbatch.").split(".")[0])
    return names


@pytest.mark.parametrize("package", sorted(ABOVE))
def test_imports_point_down_only(package: str) -> None:
    files = list((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        assert not imported(path) & ABOVE[package], path


def test_the_scheduler_imports_no_torch() -> None:
    files = list((ROOT / "scheduler").glob("*.py"))
    assert files
    for path in files:
        assert not imported(path) & {"torch", "transformers"}, path
    code = "import sys, softbatch.scheduler.engine.process; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_nothing_unpickles() -> None:
    """No pickle and no torch.load anywhere in the product."""
    for package in ABOVE:
        for path in (ROOT / package).rglob("*.py"):
            assert "pickle" not in imported(path), path
            for node in ast.walk(ast.parse(path.read_text())):
                is_load = isinstance(node, ast.Attribute) and node.attr == "load" and isinstance(node.value, ast.Name)
                assert not (is_load and node.value.id == "torch"), path


def test_every_package_is_installed() -> None:
    """An editable install finds packages that a real one would miss."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {
        f"softbatch.{path.parent.relative_to(ROOT)}".replace("/", ".")
        for name in ABOVE
        for path in (ROOT / name).rglob("*.py")
    }
    assert set(listed) == {"softbatch", *found}
