"""What a run of the benchmark says, as Markdown: figures with their spread, ratios beside the targets."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

Measure = Callable[["Run"], float | None]


@dataclass(frozen=True)
class Run:
    """One cell of one round. `kv_bytes` is the KV memory per running request, where it was watched."""

    round: int
    workload: str
    concurrency: int
    server: str
    figures: dict[str, Any]
    kv_bytes: float | None = None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def others_share(self) -> float:
        """Cores that were busy with neither the server nor the load generator."""
        return float(self.figures["server"]["others_cpu_seconds"] / self.figures["loaded_seconds"])


@dataclass(frozen=True)
class Target:
    """softbatch ÷ peer must reach `least`, by concurrency."""

    ours: str
    peer: str
    workloads: tuple[str, ...]
    unit: str
    measure: Measure
    least: Mapping[int, float]


def tokens_per_second(run: Run) -> float | None:
    return float(run.figures["output_tokens_per_second"])


def requests_per_second(run: Run) -> float | None:
    return float(run.figures["requests_per_second"])


def first_token_p99(run: Run) -> float | None:
    spread = run.figures["first_token_ms"]
    return float(spread["p99"]) if spread else None


def per_token_p50(run: Run) -> float | None:
    spread = run.figures["per_token_ms"]
    return float(spread["p50"]) if spread else None


def kv_mib(run: Run) -> float | None:
    return run.kv_bytes / 2**20 if run.kv_bytes else None


_PLAIN = ("plain", "short")
TARGETS = (
    Target("softbatch", "vllm", _PLAIN, "output tokens/s", tokens_per_second, {1: 1.5, 8: 1.3, 32: 1.3, 64: 1.3}),
    Target(
        "softbatch", "llama.cpp-BF16", _PLAIN, "output tokens/s", tokens_per_second, {1: 1.0, 8: 1.5, 32: 1.8, 64: 1.8}
    ),
    Target(
        "softbatch-int8",
        "llama.cpp-Q8_0",
        _PLAIN,
        "output tokens/s",
        tokens_per_second,
        {1: 1.0, 8: 1.5, 32: 1.5, 64: 1.5},
    ),
    # On the file that people have: as it is in both, and in 8 bits of ours.
    *(
        Target(ours, "llama.cpp-file", _PLAIN, "output tokens/s", tokens_per_second, {1: 1.0, 8: 1.5, 32: 1.8})
        for ours in ("softbatch", "softbatch-native", "softbatch-int8")
    ),
    Target("softbatch", "vllm", ("hot",), "requests/s", requests_per_second, {8: 3.0, 32: 4.0}),
    Target("softbatch", "vllm", ("many",), "requests/s", requests_per_second, {8: 15.0, 32: 25.0}),
    # What it may cost to be looked at.
    *(
        Target(ours, "softbatch", _PLAIN, "output tokens/s", tokens_per_second, dict.fromkeys((1, 8, 32, 64), 0.98))
        for ours in ("softbatch-traced", "softbatch-watched")
    ),
)
BEFORE = "softbatch-before"
READY_SECONDS = 15.0
KV_RATIO = 15.0


class Results:
    """The runs, by cell."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self._runs = runs
        self.servers = list(dict.fromkeys(run.server for run in runs))
        self.workloads = list(dict.fromkeys(run.workload for run in runs))

    def concurrencies(self, workload: str) -> list[int]:
        return sorted({run.concurrency for run in self._runs if run.workload == workload})

    def values(self, server: str, workload: str, concurrency: int, measure: Measure) -> list[float]:
        """One a round."""
        cell = (server, workload, concurrency)
        found = [measure(r) for r in self._runs if (r.server, r.workload, r.concurrency) == cell]
        return [value for value in found if value is not None]

    def median(self, server: str, workload: str, concurrency: int, measure: Measure) -> float | None:
        values = self.values(server, workload, concurrency, measure)
        return statistics.median(values) if values else None

    def ratio(self, ours: str, peer: str, workload: str, concurrency: int, measure: Measure) -> float | None:
        """Of the medians."""
        top, bottom = (self.median(name, workload, concurrency, measure) for name in (ours, peer))
        return top / bottom if top is not None and bottom else None


def describe(head: Mapping[str, Any], runs: Sequence[Run]) -> str:
    results = Results(runs)
    lines = [
        f"{head['date']}, {head['machine']}, `{head['command']}`; median (least to most) of {head['rounds']} rounds"
    ]
    for title, measure in (
        ("Output tokens/s", tokens_per_second),
        ("Requests/s", requests_per_second),
        ("Time to first token, p99, ms", first_token_p99),
        ("Time per output token, p50, ms", per_token_p50),
        ("KV memory per running request, MiB", kv_mib),
    ):
        lines += ["", f"### {title}", ""]
        for workload in results.workloads:
            table = list(_table(results, workload, measure))
            lines += [*table, ""] if table else []
    lines += ["### Ratios", "", "| ratio | target | reached | |", "|---|---|---|---|", *_ratios(results), ""]
    lines += [*_beside_before(results)]
    lines += [*_first_token(results), *_kv(results), *_ready(head["ready_seconds"]), "", *_client(runs)]
    return "\n".join(lines).rstrip() + "\n"


def _table(results: Results, workload: str, measure: Measure) -> Iterator[str]:
    columns = results.concurrencies(workload)
    rows = []
    for server in results.servers:
        cells = [_cell(results.values(server, workload, column, measure)) for column in columns]
        if any(cells):
            rows.append(f"| {server} | " + " | ".join(cells) + " |")
    if rows:
        yield f"| {workload} | " + " | ".join(f"concurrency {column}" for column in columns) + " |"
        yield "|---|" + "---|" * len(columns)
        yield from rows


def _cell(values: Sequence[float]) -> str:
    if not values:
        return ""
    digits = 2 if statistics.median(values) < 10 else 1 if statistics.median(values) < 100 else 0
    median, least, most = (f"{value:.{digits}f}" for value in (statistics.median(values), min(values), max(values)))
    return f"{median} ({least} to {most})" if len(values) > 1 else median


def _ratios(results: Results) -> Iterator[str]:
    for target in TARGETS:
        for workload in target.workloads:
            for concurrency, least in target.least.items():
                ratio = results.ratio(target.ours, target.peer, workload, concurrency, target.measure)
                if ratio is not None:
                    what = f"{workload} at {concurrency}: {target.ours} ÷ {target.peer}, {target.unit}"
                    yield f"| {what} | ≥ {least:g} | {ratio:.2f} | {_verdict(ratio >= least)} |"


def _beside_before(results: Results) -> Iterator[str]:
    """The median of each round's ratio: the two servers of a round are measured one right after the other."""
    if not {"softbatch", BEFORE} <= set(results.servers):
        return
    yield from (
        "### Beside the other checkout, output tokens/s",
        "",
        "| workload | concurrency | ratio |",
        "|---|---|---|",
    )
    for workload in results.workloads:
        for concurrency in results.concurrencies(workload):
            now, then = (
                results.values(name, workload, concurrency, tokens_per_second) for name in ("softbatch", BEFORE)
            )
            ratios = [ours / theirs for ours, theirs in zip(now, then, strict=False) if theirs]
            if ratios:
                yield f"| {workload} | {concurrency} | {_cell(ratios)} |"
    yield ""


def _first_token(results: Results) -> Iterator[str]:
    for workload in results.workloads:
        for concurrency in results.concurrencies(workload):
            ratio = results.ratio("softbatch", "vllm", workload, concurrency, first_token_p99)
            if ratio is not None and ratio > 1:
                yield f"First token p99 at {workload} {concurrency}: {ratio:.2f} times vLLM's (missed)."


def _kv(results: Results) -> Iterator[str]:
    for concurrency in results.concurrencies("hot"):
        for ours in (name for name in results.servers if name.startswith("softbatch")):
            ratio = results.ratio("vllm", ours, "hot", concurrency, kv_mib)
            if ratio is not None:
                verdict = _verdict(ratio >= KV_RATIO)
                cell = f"hot request at {concurrency}, {ours}"
                yield f"KV memory per running {cell}: 1/{ratio:.1f} of vLLM's ({verdict})."


def _ready(seconds: Mapping[str, float]) -> Iterator[str]:
    if seconds:
        yield "From start to the first answer, second start: " + ", ".join(
            f"{name} {value:.1f} s" for name, value in seconds.items()
        )
    if "softbatch" in seconds:
        yield f"Ready within {READY_SECONDS:g} s: {_verdict(seconds['softbatch'] <= READY_SECONDS)}."


def _client(runs: Sequence[Run]) -> Iterator[str]:
    share = [run.figures["client_cpu_seconds"] / run.figures["loaded_seconds"] for run in runs]
    if share:
        mean, most = 100 * statistics.mean(share), 100 * max(share)
        yield f"The load generator took {mean:.1f} % of one core, {most:.1f} % at most."
        others = [100 * run.others_share for run in runs]
        mean, most = statistics.mean(others), max(others)
        yield f"Everything else on the machine took {mean:.1f} % of one core, {most:.1f} % at most."


def _verdict(reached: bool) -> str:
    return "reached" if reached else "missed"
