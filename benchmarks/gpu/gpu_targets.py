"""What must be reached with Llama-3.1-8B's shapes on an H200, beside what was: for `gpu.py` and docs/gpu.md."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

MODEL = "Llama-3.1-8B"
Measured = Callable[[dict[str, Any]], float]


def _decode(batch: int) -> Measured:
    def fraction(found: dict[str, Any]) -> float:
        steps = {(step["batch"], step["context"]): step for step in found["steps"]["decode"]}
        return float(steps[batch, 2048]["fraction_of_limit"])

    return fraction


# The last of the hot loads has the most contexts. Of either way counts the concurrency at which it is fastest, up to
# more clients than whole contexts leave room for.
TARGETS: tuple[tuple[str, float, str, Measured], ...] = (
    ("decode, batch 1, context 2,048, of the memory floor", 0.80, "{:.0%}", _decode(1)),
    ("decode, batch 64, context 2,048, of the memory floor", 0.85, "{:.0%}", _decode(64)),
    (
        "prefill of 8,192 tokens, of the matrix product rate",
        0.70,
        "{:.0%}",
        lambda found: found["steps"]["prefill"]["fraction_of_limit"],
    ),
    (
        "output tokens/s over HTTP ÷ transformers' continuous batching",
        3,
        "{:.4g}",
        lambda found: found["times_generate_batch"],
    ),
    (
        "requests/s, 64-token soft prompts ÷ whole 8k contexts",
        26.4,
        "{:.4g}",
        lambda found: found["serving"]["hot"][-1]["times_faster"],
    ),
    (
        "KV cache per request, whole contexts ÷ soft prompts",
        38.6,
        "{:.4g}",
        lambda found: found["serving"]["hot"][-1]["times_less_kv"],
    ),
)


def table(models: dict[str, Any]) -> str:
    """As Markdown; blank where nothing was measured, because a part was left out or did not fit."""
    lines = ["| | target | measured | reached |", "|---|---|---|---|"]
    for name, target, form, measure in TARGETS:
        try:
            measured = measure(models[MODEL])
        except KeyError:
            lines.append(f"| {name} | ≥ {form.format(target)} | | |")
        else:
            reached = "yes" if measured >= target else "no"
            lines.append(f"| {name} | ≥ {form.format(target)} | {form.format(measured)} | {reached} |")
    return "\n".join(lines)
