"""The plot of a soak: curves over minutes, as an SVG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT, LEFT, GAP = 640, 110, 60, 34


@dataclass(frozen=True)
class Sample:
    """`blocks` is the share of KV blocks in use."""

    minute: float
    front_end_mib: float
    engine_mib: float
    files: int
    blocks: float


def svg(samples: Sequence[Sample]) -> str:
    curves = {
        "engine, MiB": [sample.engine_mib for sample in samples],
        "front end, MiB": [sample.front_end_mib for sample in samples],
        "open files of both": [float(sample.files) for sample in samples],
        "% of KV blocks in use": [100 * sample.blocks for sample in samples],
    }
    minutes = [sample.minute for sample in samples]
    tops = range(GAP, 10_000, HEIGHT + GAP)
    parts = [panel(title, minutes, values, top) for (title, values), top in zip(curves.items(), tops, strict=False)]
    tall = len(curves) * (HEIGHT + GAP) + GAP
    parts.append(text(LEFT + WIDTH / 2, tall - 12, f"{minutes[-1]:.0f} minutes", "middle"))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LEFT + WIDTH + 20} {tall}" font-family="sans-serif" '
        f'font-size="12"><rect width="100%" height="100%" fill="white"/>{"".join(parts)}</svg>\n'
    )


def panel(title: str, minutes: Sequence[float], values: Sequence[float], top: float) -> str:
    """One curve from zero up, above its time."""
    most = max(*values, 1.0) * 1.1
    points = " ".join(
        f"{LEFT + WIDTH * minute / minutes[-1]:.1f},{top + HEIGHT * (1 - value / most):.1f}"
        for minute, value in zip(minutes, values, strict=True)
    )
    frame = f'<rect x="{LEFT}" y="{top}" width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#bbb"/>'
    curve = f'<polyline points="{points}" fill="none" stroke="#1f77b4" stroke-width="1.5"/>'
    labels = text(LEFT - 6, top + HEIGHT, "0", "end") + text(LEFT - 6, top + 10, f"{most:.0f}", "end")
    return frame + curve + labels + text(LEFT, top - 6, title, "start")


def text(x: float, y: float, words: str, anchor: str) -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}">{words}</text>'
