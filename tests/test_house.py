"""The plan of the house: imports point down, each kind of code stays in its room, and no name stands twice."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ABOVE = {"prompt_store": {"scheduler", "server"}, "scheduler": {"server"}, "server": set()}


@cache
def nodes(path: Path) -> list[ast.AST]:
    """All of a file's syntax tree, of which nobody may change anything."""
    return list(ast.walk(ast.parse(path.read_text())))


@cache
def imported(path: Path) -> set[str]:
    """Top-level packages that a file imports anywhere, also inside functions."""
    names = set()
    for node in nodes(path):
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


def test_a_server_starts_its_engine_before_it_imports_torch() -> None:
    """Which takes seconds, and so do transformers and numpy. What the front end imports behind that is its own."""
    heavy = {"torch", "transformers", "numpy", "fastapi"}
    code = (
        "import sys, softbatch.server.cli.serve, softbatch.server.services; print(*sorted(sys.modules)); "
        "import softbatch.server.app; print(*sorted(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    services, app = map(str.split, run.stdout.splitlines())
    assert "softbatch.server.services" in services
    assert not heavy & set(services)
    assert "softbatch.server.app" in app
    assert not heavy - {"fastapi"} & set(app)


def test_the_front_end_imports_no_models(tmp_path: Path) -> None:
    """Nor torch, though it checks soft prompts that are uploaded. Both are most of a start's processor time, and of the
    front end's memory."""
    code = (
        "import sys; from pathlib import Path; "
        "from softbatch.server.cli.serve import _import_what_serves; _import_what_serves(); "
        "from softbatch.scheduler.model.source import resolve; tokenizer = resolve('smollm2-135m').tokenizer; "
        "text = tokenizer.apply_chat_template([{'role': 'user', 'content': 'Hi'}], tokenize=False); "
        "from softbatch.prompt_store.stores.directory import PromptStore; "
        "store = PromptStore(Path(sys.argv[1]), 1 << 30); "
        "stored = store.add('manual', Path('examples/manual/manual.safetensors')); "
        "print('Hi' in text, tokenizer.decode(tokenizer.encode('sea')), stored.name, *sorted("
        "{'transformers.activations', 'transformers.modeling_utils', 'torch', 'sympy', 'scipy', 'pandas'} "
        "& set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    assert run.stdout.split() == ["True", "sea", "manual"]
    assert not run.stderr


def test_nothing_unpickles() -> None:
    """No pickle and no torch.load anywhere in the product."""
    for package in ABOVE:
        for path in (ROOT / package).rglob("*.py"):
            assert "pickle" not in imported(path), path
            for node in nodes(path):
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
        for paths in places.values():
            others = [path for path in paths if path.rpartition("/")[0] not in rooms]
            assert len(others) + bool(len(paths) > len(others)) == 1, f"one name, {paths}"


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in PRODUCT}


@cache
def imported_modules(path: Path) -> set[str]:
    """Modules of the product that a file names anywhere, in functions and under TYPE_CHECKING too."""
    names: set[str] = set()
    for node in nodes(path):
        if isinstance(node, ast.Import):
            names |= {alias.name.removeprefix("softbatch.") for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            base = node.module.removeprefix("softbatch.")
            for alias in node.names:
                names.add(f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base)
    return names & MODULES.keys() - {module_name(path)}


def in_circles(graph: dict[str, set[str]]) -> set[str]:
    """Nodes that can reach themselves."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        pending = list(graph[start])
        while pending:
            node = pending.pop()
            if node not in seen:
                seen.add(node)
                pending += graph[node]
        return seen

    return {node for node in graph if node in reached(node)}


def siblings(modules: set[str]) -> dict[str, dict[str, set[str]]]:
    """For each folder, which of its children (a module or a folder) imports which other one."""
    graphs: dict[str, dict[str, set[str]]] = {}
    for name in modules:
        for other in {name, *imported_modules(MODULES[name])}:
            one, two = name.split("."), other.split(".")
            depth = next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), None)
            if depth is not None:
                graph = graphs.setdefault(".".join(one[:depth]), {})
                graph.setdefault(one[depth], set()).add(two[depth])
                graph.setdefault(two[depth], set())
    return graphs


def circles_of_siblings() -> set[str]:
    return {f"{where}: {node}" for where, graph in siblings(set(MODULES)).items() for node in in_circles(graph)}


TRANSPARENT = re.compile(r"\b(namespace|struct|class|enum|union|extern)\b[^()]*$")


def long_cpp_functions() -> set[str]:
    """By counting braces: a function is a block that only namespaces and classes enclose."""
    found = set()
    for path in KERNEL_SOURCES:
        text = re.sub(r"//[^\n]*|\"(\\.|[^\"\\])*\"|^#.*$", "", path.read_text(), flags=re.MULTILINE)
        opened: list[tuple[bool, int, str]] = []
        start = 0
        for match in re.finditer(r"[{};]", text):
            if match[0] == "{":
                header = text[start : match.start()].strip()
                first = text.count("\n", 0, match.start()) - header.count("\n")
                opened.append((not TRANSPARENT.search(header), first, header))
            elif match[0] == "}" and opened:
                is_function, first, header = opened.pop()
                named = re.search(r"(\w+)\s*\(", header)
                outermost = is_function and not any(function for function, _, _ in opened)
                if outermost and named and text.count("\n", 0, match.start()) - first >= 60:
                    found.add(f"{short(path)}:{named[1]}")
            start = match.end()
    return found


def classes_twice() -> set[str]:
    places: dict[str, set[Path]] = {}
    for path in PRODUCT:
        for node in nodes(path):
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, set()).add(path)
    return {name for name, paths in places.items() if len(paths) > 1}


def long_functions() -> set[str]:
    functions = [
        (path, node)
        for path in PRODUCT
        for node in nodes(path)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    return {f"{short(path)}:{node.name}" for path, node in functions if (node.end_lineno or 0) - node.lineno >= 60}


def elsewhere(files: list[Path], pattern: str, *allowed: str) -> set[str]:
    """Files outside the allowed places that hold what the pattern says."""
    outside = [path for path in files if not short(path).startswith(allowed)]
    return {short(path) for path in outside if re.search(pattern, path.read_text())}


OPS = "scheduler/model/cpu/"
INTRINSICS = r"\b_mm\d*_|immintrin\.h|__builtin_ia32|\b_tile_"
ROOMS_OF_INTRINSICS = tuple(f"{OPS}csrc/{place}" for place in ("simd/", "matmul/", "attention/kv_format.h"))
STATUS = r"\bstatus_code\s*=(?!=)|(ApiError|HTTPException)\(\s*[1-5]\d\d\b"
CHECKS = {
    "modules in an import circle": lambda: in_circles({name: imported_modules(path) for name, path in MODULES.items()}),
    "neighbours that import each other": circles_of_siblings,
    "classes of one name": classes_twice,
    "functions of more than 60 lines": lambda: long_functions() | long_cpp_functions(),
    "torch.ops.softbatch outside cpu/ops.py": lambda: elsewhere(
        [*PRODUCT, *(ROOT / "tests").rglob("*.py")],
        r"torch\.(ops|classes)\.softbatch",
        f"{OPS}ops.py",
        "tests/test_house.py",
    ),
    "intrinsics outside their rooms": lambda: elsewhere(KERNEL_SOURCES, INTRINSICS, *ROOMS_OF_INTRINSICS),
    "status codes outside server/http and server/routes": lambda: elsewhere(
        PRODUCT, STATUS, "server/http/", "server/routes/"
    ),
}
# Today's violators. An entry may only leave: one that no longer violates must be removed.
KNOWN: dict[str, set[str]] = {
    "functions of more than 60 lines": {
        "scheduler/model/attention/triton_kernels.py:attend",
    },
}


@cache
def violators(check: str) -> set[str]:
    return CHECKS[check]()


@pytest.mark.parametrize("check", CHECKS)
def test_the_plan_has_no_new_violators(check: str) -> None:
    new = violators(check) - KNOWN.get(check, set())
    assert not new, f"{check}: {sorted(new)}"


@pytest.mark.parametrize("check", CHECKS)
def test_known_violators_still_violate(check: str) -> None:
    mended = KNOWN.get(check, set()) - violators(check)
    assert not mended, f"{check}: remove {sorted(mended)} from KNOWN"
