"""The plan of the house: imports point down, each kind of code stays in its room, and no name stands twice."""

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
    code = (
        "import sys, softbatch.scheduler.engine.engine, softbatch.scheduler.scheduler; sys.exit('torch' in sys.modules)"
    )
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


PRODUCT = sorted(path for package in ABOVE for path in (ROOT / package).rglob("*.py"))
CSRC = ROOT / "scheduler" / "model" / "cpu" / "csrc"
KERNEL_SOURCES = sorted(path for path in CSRC.rglob("*") if path.suffix in {".h", ".cpp"})


def short(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_scheduling_knows_no_clock_socket_or_path() -> None:
    for path in (ROOT / "scheduler").glob("*.py"):
        found = imported(path) & {"time", "zmq", "pathlib"}
        assert not found, f"{short(path)} imports {sorted(found)}: scheduling decides, others wait, send and read"


def test_the_engine_names_no_torch() -> None:
    for path in (ROOT / "scheduler" / "engine").rglob("*.py"):
        found = top_level_imports(path) & {"torch", "transformers"}
        assert not found, f"{short(path)} imports {sorted(found)}: the engine steps what the runner computes"


def top_level_imports(path: Path) -> set[str]:
    """Packages that a file imports when it is imported itself, functions excepted."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            node.body = []
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


def test_no_base_name_twice() -> None:
    """A route, its schema and its command may share one name."""
    rooms = {"server/routes", "server/schemas", "server/cli"}
    for files in (PRODUCT, KERNEL_SOURCES):
        places: dict[str, list[str]] = {}
        for path in files:
            if path.name != "__init__.py":
                places.setdefault(path.name, []).append(short(path))
        for name, paths in places.items():
            others = [path for path in paths if path.rpartition("/")[0] not in rooms]
            assert len(others) + bool(len(paths) > len(others)) == 1, f"one name, {paths}"
