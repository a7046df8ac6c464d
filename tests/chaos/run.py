"""What happens to a server under fire and under load, beside what is asked of it: `make chaos`."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.chaos import (
    disconnects,
    engine_hangs,
    engine_kills,
    light_beside_heavy,
    overload,
    short_beside_long,
    soak,
)
from tests.chaos.stage import Finding
from tests.support.models import save_tiny_compressible

Scenario = Callable[[argparse.Namespace, Path], list[Finding]]
SCENARIOS: dict[str, Scenario] = {
    "kills": engine_kills.run,
    "hangs": engine_hangs.run,
    "long-prompts": short_beside_long.run,
    "keys": light_beside_heavy.run,
    "overload": overload.run,
    "disconnects": disconnects.run,
    "soak": soak.run,
}


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    with tempfile.TemporaryDirectory() as models:
        if options.tiny:
            options.model = save_tiny_compressible(Path(models) / "tiny")
        return show(options)


def show(options: argparse.Namespace) -> int:
    held = True
    for name in options.only or SCENARIOS:
        with tempfile.TemporaryDirectory() as folder:
            findings = SCENARIOS[name](options, Path(folder))
        load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
        print(f"\n{name} ({options.model}; load averages of the machine, {os.cpu_count()} processors: {load})")
        for finding in findings:
            verdict = {True: "held", False: "NOT HELD", None: ""}[finding.held]
            print(f"  {finding.what:<76} {finding.asked:<16} {finding.measured:<70} {verdict}", flush=True)
        held &= all(finding.held is not False for finding in findings)
    return 0 if held else 1


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__)
    made.add_argument("--only", nargs="+", choices=list(SCENARIOS), help="these scenarios; default: all")
    made.add_argument("--model", default="smollm2-135m")
    made.add_argument(
        "--tiny", action="store_true", help="a tiny model instead, whose compressions end on a busy machine"
    )
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--rounds", type=int, default=2, help="of measurements that are made in turn")
    made.add_argument("--seconds", type=float, default=20, help="of each such measurement")
    kills = made.add_argument_group("kills and hangs")
    kills.add_argument("--requests", type=int, default=200)
    kills.add_argument("--max-tokens", type=int, default=48)
    kills.add_argument("--kills", type=int, default=5)
    kills.add_argument("--dtype", default="float32")
    made.add_argument("--overload-seconds", type=float, default=60)
    made.add_argument("--clients", type=int, default=1000, help="that disconnect")
    made.add_argument("--soak-minutes", type=float, default=20)
    made.add_argument("--plot", type=Path, help="where the soak's plot goes, an SVG")
    return made


if __name__ == "__main__":
    sys.exit(main())
