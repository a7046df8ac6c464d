"""The GPU's targets: what was measured is judged, and what was not stays blank."""

from __future__ import annotations

from typing import Any

from benchmarks.gpu.gpu_targets import MODEL, table


def figures() -> dict[str, Any]:
    decode = [
        {"batch": batch, "context": context, "fraction_of_limit": fraction}
        for batch, context, fraction in ((1, 128, 0.1), (1, 2048, 0.81), (64, 128, 0.2), (64, 2048, 0.84))
    ]
    hot = [{"times_faster": 3.0, "times_less_kv": 1.5}, {"times_faster": 40.25, "times_less_kv": 38.5}]
    steps = {"decode": decode, "prefill": {"fraction_of_limit": 0.7}}
    return {"steps": steps, "times_generate_batch": 3.5, "serving": {"hot": hot}}


def judged(found: dict[str, Any]) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[2:5]] for line in table({MODEL: found}).splitlines()[2:]]


def test_each_target_is_judged() -> None:
    assert judged(figures()) == [
        ["≥ 80%", "81%", "yes"],
        ["≥ 85%", "84%", "no"],
        ["≥ 70%", "70%", "yes"],
        ["≥ 3", "3.5", "yes"],
        ["≥ 26.4", "40.25", "yes"],
        ["≥ 38.6", "38.5", "no"],
    ]


def test_what_was_not_measured_stays_blank() -> None:
    found = figures()
    del found["serving"], found["times_generate_batch"], found["steps"]["decode"][3]
    assert [row[1:] for row in judged(found)] == [["81%", "yes"], ["", ""], ["70%", "yes"], *[["", ""]] * 3]
    assert all(line.endswith("| | |") for line in table({}).splitlines()[2:])
