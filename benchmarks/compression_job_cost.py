"""What a compression job costs the requests served meanwhile: the same load without a job and beside one.

python benchmarks/compression_job_cost.py
"""

from __future__ import annotations

import argparse
import http.client
import json
import statistics
import sys
import time
from pathlib import Path

from against_transformers import Softbatch

CONTEXT = Path(__file__).resolve().parent.parent / "examples" / "manual" / "context.md"
LOAD = {1: 6, 8: 24}


def post(port: int, path: str, body: dict[str, object]) -> dict[str, object]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    reply = connection.getresponse()
    found: dict[str, object] = json.loads(reply.read())
    if reply.status >= 300:
        raise RuntimeError(f"{path}: {reply.status} {found}")
    return found


def job_phase(port: int, job: object) -> str:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", f"/v1/compressions/{job}")
    found = json.loads(connection.getresponse().read())
    if found["status"] not in ("queued", "running"):
        raise RuntimeError(f"the job ended too early: {found}")
    return str((found.get("progress") or {}).get("phase", found["status"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--port", type=int, default=8398)
    options = parser.parse_args()
    server = Softbatch("bfloat16", options.port)
    try:
        server.run(8, 16, 900_000)
        steps: dict[tuple[str, int], list[float]] = {}

        def load(label: str, offset: int) -> None:
            for round_number in range(options.rounds):
                for concurrency, requests in LOAD.items():
                    start = offset + round_number * 1000 + concurrency * 100
                    figures = server.run(concurrency, requests, start)
                    steps.setdefault((label, concurrency), []).append(figures["tokens_per_second"])
                    print(f"{label} c={concurrency}: {figures}", file=sys.stderr, flush=True)

        load("alone", 0)
        body = {"name": "cost", "context": CONTEXT.read_text(), "minutes": 20}
        job = post(options.port, "/v1/compressions", body)["id"]
        for number, phases in enumerate((("gold",), ("training",))):
            while job_phase(options.port, job) not in phases:
                time.sleep(1)
            load(f"beside {phases[0]}", 100_000 * (number + 1))
    finally:
        server.stop()
    print("| output tokens/s, median (least to most) | " + " | ".join(f"concurrency {c}" for c in LOAD) + " |")
    print("|---|" + "---|" * len(LOAD))
    for label in dict.fromkeys(label for label, _ in steps):
        cells = [steps[label, c] for c in LOAD]
        print(
            f"| {label} | "
            + " | ".join(f"{statistics.median(c):.0f} ({min(c):.0f}-{max(c):.0f})" for c in cells)
            + " |"
        )


if __name__ == "__main__":
    main()
