"""What the scheduler itself costs per step: schedule(), mark_in_flight() and postprocess(), no model.

Against the number waiting, which must not matter, and the number running, which may. Between two measured steps
nothing else happens, as in a server whose batch is full.

    python -m benchmarks.parts.scheduler_cost --output scheduler.svg
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from softbatch.scheduler.protocol import AddRequest, SamplingParams, SoftPromptRef
from softbatch.scheduler.scheduler import Scheduler
from softbatch.scheduler.scheduler_config import SchedulerConfig
from softbatch.scheduler.step import Step, StepResult

RUNNING = (1, 4, 16, 64, 128, 256)
WAITING = (0, 100, 1_000, 10_000)
PROMPT_TOKENS = 64
RESIDENT = 400


def requests(
    count: int, name: str, output_tokens: int, soft_prompt: SoftPromptRef | None = None
) -> Iterator[AddRequest]:
    for index in range(count):
        yield AddRequest(
            request_id=f"{name}-{index:026d}",
            token_ids=[(index * 7919 + i * 104729) % 40_000 for i in range(PROMPT_TOKENS)],
            params=SamplingParams(max_tokens=output_tokens, temperature=0, ignore_eos=True),
            soft_prompt=soft_prompt,
        )


def scheduler_with(running: int, waiting: int, output_tokens: int) -> Scheduler:
    """A full batch in the middle of decoding, with others waiting behind it and soft prompts in the cache."""
    config = SchedulerConfig(
        max_batch_size=running,
        max_batch_tokens=max(512, running),
        max_model_len=8192,
        max_queue_size=running + waiting + RESIDENT,
        num_blocks=running * (-(-(PROMPT_TOKENS + output_tokens) // 16) + 5) + 4 * RESIDENT,
        block_size=16,
        eos_token_ids=frozenset((2,)),
    )
    scheduler = Scheduler(config)
    _fill_cache(scheduler)
    lengths = range(output_tokens // 2, output_tokens)
    for index, request in enumerate(requests(running + waiting, "r", output_tokens)):
        # Spread, so that later a few end in each step and others take their places.
        params = SamplingParams(max_tokens=lengths[index * 37 % len(lengths)], temperature=0, ignore_eos=True)
        scheduler.add(AddRequest(request_id=request.request_id, token_ids=request.token_ids, params=params))
    while len(scheduler.running) < running:
        advance(scheduler)
    # Until the last of them decodes too.
    for _ in range(running * PROMPT_TOKENS // config.max_batch_tokens + 1):
        advance(scheduler)
    return scheduler


def _fill_cache(scheduler: Scheduler) -> None:
    """Many soft prompts that nobody uses now."""
    for index in range(RESIDENT):
        ref = SoftPromptRef(sha256=f"{index:064x}", path="", num_virtual_tokens=64)
        scheduler.add(next(requests(1, f"p{index}", 1, ref)))
        while scheduler.has_work:
            step = scheduler.schedule()
            for read in step.soft_prompts_to_load:
                scheduler.soft_prompt_loads.finish(read.sha256)
            result = sampled(step)
            scheduler.mark_in_flight(step)
            scheduler.postprocess(step, result)


def sampled(step: Step) -> StepResult:
    ends = {row.sequence.request_id: 1000 for row in step.rows if row.end == row.sequence.length}
    return StepResult(tokens=ends, logprobs={}, scores={}, errors={}, prefill_errors={})


def advance(scheduler: Scheduler) -> float:
    """One step; returns the seconds that are the scheduler's."""
    started = time.perf_counter()
    step = scheduler.schedule()
    scheduled = time.perf_counter()
    result = sampled(step)
    resumed = time.perf_counter()
    scheduler.mark_in_flight(step)
    scheduler.postprocess(step, result)
    scheduler.stats(1)
    return time.perf_counter() - resumed + scheduled - started


def measure(running: int, waiting: int, steps: int, output_tokens: int = 2000) -> tuple[float, float]:
    """Milliseconds per step: median and 99th percentile."""
    scheduler = scheduler_with(running, waiting, output_tokens)
    seconds = sorted(advance(scheduler) for _ in range(steps))
    scheduler.check_integrity()
    return 1000 * statistics.median(seconds), 1000 * seconds[int(0.99 * (len(seconds) - 1))]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--output", type=Path, help="an SVG of the curves")
    options = parser.parse_args()
    print(f"ms per step, median (99th percentile) of {options.steps} steps; {RESIDENT} soft prompts in the cache\n")
    print("| running | " + " | ".join(f"{count:,} waiting" for count in WAITING) + " |")
    print("|---|" + "---|" * len(WAITING))
    curves: dict[int, list[float]] = {count: [] for count in WAITING}
    for running in RUNNING:
        cells = []
        for waiting in WAITING:
            median, most = measure(running, waiting, options.steps)
            curves[waiting].append(median)
            cells.append(f"{median:.3f} ({most:.3f})")
        print(f"| {running} | " + " | ".join(cells) + " |", flush=True)
    median, most = measure(256, 10_000, options.steps, output_tokens=128)
    print(f"\nWith a few requests ending, and others beginning, in each step, 256 running: {median:.3f} ({most:.3f})")
    if options.output:
        _draw(curves, options.output)
    return 0


def _draw(curves: dict[int, list[float]], target: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5, 3.2))
    for waiting, values in curves.items():
        axes.plot(RUNNING, values, marker="o", markersize=4, label=f"{waiting:,} waiting")
    axes.axhline(1.0, color="grey", linewidth=1, linestyle="--")
    axes.set_xlabel("running sequences")
    axes.set_ylabel("ms per step")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(target, metadata={"Date": None})


if __name__ == "__main__":
    sys.exit(main())
