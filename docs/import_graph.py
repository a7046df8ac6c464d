"""Draws which room imports which, `TYPE_CHECKING` included: docs/plots/import-graph.svg. Arrows point down."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("server", "scheduler", "prompt_store")
WIDTH, HEIGHT, GAP_X, GAP_Y = 190, 30, 24, 46


def rooms() -> dict[str, set[str]]:
    """Each room with those that it imports. A room is a folder, or a file that stands beside folders."""
    found: dict[str, set[str]] = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            if path.name == "__init__.py" and not any(True for _ in _imported(path)):
                continue
            room = _room(path)
            targets = found.setdefault(room, set())
            targets |= {target for target in _imported(path) if target != room}
    for targets in list(found.values()):
        for target in targets:
            found.setdefault(target, set())
    return found


def _room(path: Path) -> str:
    has_folders = any(child.is_dir() and (child / "__init__.py").exists() for child in path.parent.iterdir())
    room = path if has_folders else path.parent
    return str(room.relative_to(ROOT)).removesuffix(".py")


def _imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
        for name in names:
            if not name.startswith("softbatch."):
                continue
            place = ROOT / Path(*name.split(".")[1:])
            if (module := place.with_suffix(".py")).exists():
                yield _room(module)
                continue
            for alias in node.names:
                inner = place / f"{alias.name}.py"
                yield _room(inner if inner.exists() else place / "__init__.py")


def floors(graph: dict[str, set[str]]) -> dict[str, int]:
    """Each room's height above those it imports. Rooms that import each other share a floor."""
    height = dict.fromkeys(graph, 0)
    reach = {room: _reachable(room, graph) for room in graph}
    for _ in graph:
        for room, targets in graph.items():
            below = [height[target] + (room not in reach[target]) for target in targets]
            height[room] = max([height[room], *below])
    return height


def _reachable(room: str, graph: dict[str, set[str]]) -> set[str]:
    seen: set[str] = set()
    waiting = [room]
    while waiting:
        for target in graph[waiting.pop()] - seen:
            seen.add(target)
            waiting.append(target)
    return seen


def svg() -> str:
    """The drawing: high floors on top; arrows that do not point down are red."""
    graph = rooms()
    height = floors(graph)
    levels = [[room for room in sorted(graph) if height[room] == level] for level in range(max(height.values()) + 1)]
    widest = max(map(len, levels))
    place = {
        room: (
            20 + (column + (widest - len(row)) / 2) * (WIDTH + GAP_X),
            20 + (len(levels) - 1 - level) * (HEIGHT + GAP_Y),
        )
        for level, row in enumerate(levels)
        for column, room in enumerate(row)
    }
    parts = []
    for room, targets in sorted(graph.items()):
        x, y = place[room]
        for target in sorted(targets):
            to_x, to_y = place[target]
            colour = "#7a8ca5" if to_y > y else "#d03030"
            start, end = (y + HEIGHT, to_y) if to_y > y else (y + HEIGHT / 2, to_y + HEIGHT / 2)
            middle = x + WIDTH / 2, to_x + WIDTH / 2
            parts.append(
                f'<path d="M{middle[0]},{start} C{middle[0]},{start + 30} {middle[1]},{end - 30} {middle[1]},{end}" '
                f'fill="none" stroke="{colour}" stroke-opacity="0.55" marker-end="url(#tip)"/>'
            )
    fills = {"server": "#dcebff", "scheduler": "#e3f6e0", "prompt_store": "#fff0d6"}
    for room, (x, y) in sorted(place.items()):
        fill = fills[room.split("/")[0]]
        parts.append(f'<rect x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}" rx="5" fill="{fill}" stroke="#667"/>')
        label = room.replace("prompt_store/compression/", "compression/").replace("scheduler/model/", "model/")
        parts.append(f'<text x="{x + WIDTH / 2}" y="{y + 19}" text-anchor="middle">{label}</text>')
    width = max(x for x, _ in place.values()) + WIDTH + 20
    tall = max(y for _, y in place.values()) + HEIGHT + 20
    tip = '<marker id="tip" markerWidth="7" markerHeight="7" refX="6" refY="3" orient="auto"><path d="M0,0 L6,3 L0,6"/>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {tall}" font-family="sans-serif" font-size="12">'
        f'<rect width="100%" height="100%" fill="white"/><defs>{tip}</marker></defs>{"".join(parts)}</svg>\n'
    )


if __name__ == "__main__":
    (ROOT / "docs" / "plots" / "import-graph.svg").write_text(svg())
