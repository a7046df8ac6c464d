"""softbatch's engine beside OpenVINO GenAI and transformers, step by step: same weights, same threads, one run.

    python -m benchmarks.libraries.libraries --output figures.json
    python -m benchmarks.libraries.libraries --libraries softbatch,openvino --batches 1,32

Nothing goes through HTTP. Each library is loaded once, in a process of its own, and suspended while another is
measured. In every round all do the same in turn: prefill of one prompt, greedy decoding of 1, 4, 16 and 32 sequences.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shlex
import signal
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.flags import names_of
from benchmarks.libraries.library_process import GENERATE_BATCH, LIBRARIES, Library
from benchmarks.machine import machine
from benchmarks.serving.peers import Unavailable
from softbatch.scheduler.model.source import EMBEDDED_ALIAS, resolve


@dataclass(frozen=True)
class Run:
    """One answer: the seconds of the step that takes in the prompts, which are numbered from `first`,
    and of each further step."""

    round: int
    library: str
    first: int
    batch: int
    context: int
    seconds: list[float]
    tokens: list[list[int]]


def load_all(options: argparse.Namespace, loaded: dict[str, Library]) -> None:
    """Fill `loaded` with those that can be had."""
    model = resolve(options.model).path
    common = {
        "dtype": options.dtype,
        "threads": options.threads,
        "max_batch_size": max(options.batches),
        # All prompts in one step, so that all sequences are in every further one.
        "max_batch_tokens": max(options.prefill, max(options.batches) * options.context),
    }
    for name in options.libraries:
        try:
            loaded[name] = Library(name, LIBRARIES[name](model), common)
        except Unavailable as error:
            say(f"{name}: skipped: {error}")
    for name, library in list(loaded.items()):
        try:
            library.wait_until_loaded()
            library.ask(900_000, min(2, max(options.batches)), options.context, 2)
            say(f"{name} {library.version}: loaded")
        except Unavailable as error:
            say(f"{name}: skipped: {error}")
            del loaded[name]


def measure(options: argparse.Namespace, libraries: Sequence[Library]) -> list[Run]:
    """No prompt is given twice to the same library."""
    runs = []
    prefills = [(1, options.prefill, 1)] * 3
    questions = [*prefills, *((batch, options.context, 1 + options.steps) for batch in options.batches)]
    first = 0
    for number in range(options.rounds):
        for batch, context, outputs in questions:
            for library in libraries:
                answer = library.ask(first, batch, context, outputs)
                runs.append(Run(number, library.name, first, batch, context, answer["seconds"], answer["tokens"]))
            first += batch
        libraries = [*libraries[1:], *libraries[:1]]
        say(f"round {number + 1} of {options.rounds} done")
    return runs


def cells(runs: Sequence[Run], name: str, batch: int, context: int, steps: slice) -> list[float]:
    """Of each round the median of the asked steps, in seconds."""
    found: dict[int, list[float]] = {}
    for run in runs:
        if (run.library, run.batch, run.context) == (name, batch, context):
            found.setdefault(run.round, []).extend(run.seconds[steps])
    return [statistics.median(seconds) for seconds in found.values()]


def agreement(runs: Sequence[Run], name: str, reference: str) -> float:
    """How much of what the reference wrote the library wrote too, each sequence up to its first other token."""
    written, expected = (
        {run.first + i: row for run in runs if run.library == library for i, row in enumerate(run.tokens)}
        for library in (name, reference)
    )
    same = 0
    for index, row in expected.items():
        pairs = zip(row, written[index], strict=True)
        same += sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    return same / sum(map(len, expected.values()))


def describe(head: dict[str, Any], options: argparse.Namespace, runs: Sequence[Run]) -> str:
    names = [name for name in options.libraries if any(run.library == name for run in runs)]
    batches = [f"{batch} sequence{'s' * (batch > 1)}" for batch in options.batches]
    lines = [
        f"{head['date']}, {head['machine']}, {options.threads} threads, {options.dtype}, `{head['command']}`; rounds: "
        f"{options.rounds}, median (least to most)",
        "",
        f"| ms per decode step, {options.context} tokens before it | {' | '.join(batches)} "
        f"| prefill of {options.prefill}, tokens/s | same tokens |",
        "|---|" + "---|" * (len(batches) + 2),
    ]
    for name in names:
        steps = [
            spread([1000 * s for s in cells(runs, name, batch, options.context, slice(1, None))], 1)
            for batch in options.batches
        ]
        prefill = [options.prefill / seconds for seconds in cells(runs, name, 1, options.prefill, slice(1))]
        same = 100 * agreement(runs, name, names[0])
        lines.append(f"| {name} | {' | '.join(steps)} | {spread(prefill, 0)} | {same:.0f} % |")
    lines += ["", f"Same tokens: as {names[0]} chose, in each sequence up to the first other one."]
    return "\n".join(lines)


def spread(values: Sequence[float], digits: int) -> str:
    median = f"{statistics.median(values):.{digits}f}"
    return f"{median} ({min(values):.{digits}f} to {max(values):.{digits}f})" if len(values) > 1 else median


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--libraries", type=names_of(LIBRARIES), default=list(LIBRARIES), help=", ".join(LIBRARIES))
    parser.add_argument("--skip-generate-batch", action="store_true", help=f"leave out {GENERATE_BATCH}, which is slow")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batches", type=_numbers, default=[1, 4, 16, 32])
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--steps", type=int, default=16, help="decode steps measured at once")
    parser.add_argument("--prefill", type=int, default=512)
    parser.add_argument("--batched", type=int, default=8, help=f"prompts of {GENERATE_BATCH}")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--model", default=EMBEDDED_ALIAS)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--output", type=Path, help="JSON file, with every step's time")
    options = parser.parse_args()
    if options.skip_generate_batch:
        options.libraries = [name for name in options.libraries if name != GENERATE_BATCH]
    # Suspended processes outlive their parent: whatever ends this, they must be stopped on the way out.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    libraries: dict[str, Library] = {}
    try:
        load_all(options, libraries)
        if not libraries:
            return 1
        content: dict[str, Any] = {
            "date": time.strftime("%Y-%m-%d %H:%M"),
            "machine": machine(),
            "command": shlex.join(["python", "-m", "benchmarks.libraries.libraries", *sys.argv[1:]]),
            "dtype": options.dtype,
            "threads": options.threads,
            "versions": {name: library.version for name, library in libraries.items()},
        }
        stepwise = [library for name, library in libraries.items() if name != GENERATE_BATCH]
        if stepwise:
            runs = measure(options, stepwise)
            content["runs"] = [asdict(run) for run in runs]
            print(describe(content, options, runs))
        if GENERATE_BATCH in libraries:
            prompts = options.rounds * (sum(options.batches) + 3), options.batched
            content["generate_batch"] = libraries[GENERATE_BATCH].ask(*prompts, options.context, options.steps)
            print(
                f"\n{GENERATE_BATCH}, {options.batched} prompts of {options.context}, {options.steps} more each; "
                f"faster of two runs: {content['generate_batch']['tokens_per_second']:.1f} output tokens/s"
            )
    except Unavailable as error:
        say(str(error))
        return 1
    finally:
        for library in libraries.values():
            library.stop()
    if options.output:
        options.output.write_text(json.dumps(content) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
