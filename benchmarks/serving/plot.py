"""The figure of the benchmark: output tokens per second, or requests, against concurrency, with the spread."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.serving.tables import Results, Run, requests_per_second, tokens_per_second

COLOURS = {
    "softbatch": "#0b5fa5",
    "vllm": "#c2541b",
    "llama.cpp-BF16": "#4d7f36",
    "softbatch-int8": "#6aa7dc",
    "softbatch-kv-int8": "#7a5fb0",
    "softbatch-kv-k6v4": "#b59ad6",
    "softbatch-traced": "#d9a521",
    "softbatch-watched": "#8a8a8a",
    "llama.cpp-Q8_0": "#9cc48a",
}


def draw(runs: Sequence[Run], target: Path) -> None:
    """An SVG with one panel a workload; says so when matplotlib is missing."""
    try:
        import matplotlib

        matplotlib.use("svg")
        from matplotlib import pyplot
    except ImportError:
        print("no plot: matplotlib is not installed", file=sys.stderr)
        return
    results = Results(runs)
    figure, axes = pyplot.subplots(
        1, len(results.workloads), figsize=(3.6 * len(results.workloads), 3.4), squeeze=False
    )
    for panel, workload in zip(axes[0], results.workloads, strict=True):
        whole = workload in ("hot", "many")
        measure = requests_per_second if whole else tokens_per_second
        for server in results.servers:
            points = [(c, results.values(server, workload, c, measure)) for c in results.concurrencies(workload)]
            points = [(concurrency, values) for concurrency, values in points if values]
            if not points:
                continue
            middle = [statistics.median(values) for _, values in points]
            below = [m - min(values) for m, (_, values) in zip(middle, points, strict=True)]
            above = [max(values) - m for m, (_, values) in zip(middle, points, strict=True)]
            panel.errorbar(
                [concurrency for concurrency, _ in points],
                middle,
                yerr=[below, above],
                label=server,
                color=COLOURS.get(server),
                marker="o",
                markersize=4,
                capsize=3,
            )
        panel.set_xscale("log", base=2)
        ticks = results.concurrencies(workload)
        panel.set_xticks(ticks, [str(tick) for tick in ticks])
        panel.set_ylim(bottom=0)
        panel.set_title(workload)
        panel.set_xlabel("concurrency")
        panel.set_ylabel("requests/s" if whole else "output tokens/s")
        panel.grid(alpha=0.3)
    entries = {label: line for panel in axes[0] for line, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    columns = max(1, min(len(entries), 2 * len(results.workloads)))
    figure.legend(entries.values(), entries.keys(), loc="lower center", ncols=columns, frameon=False)
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    figure.savefig(target, metadata={"Date": None})
    pyplot.close(figure)
