"""What a compression job costs the requests served meanwhile: the same load without a job and beside one.

python benchmarks/compression_job_cost.py
"""

from __future__ import annotations

import argparse
import http.client
import json
import statistics
import sys
from itertools import count
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


def job_phase(port: int, job: object) -> str | None:
    """What the job is at, None once it has ended."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", f"/v1/compressions/{job}")
    found = json.loads(connection.getresponse().read())
    if found["status"] not in ("queued", "running"):
        return None
    return str((found.get("progress") or {}).get("phase", found["status"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="without a job; beside it, as many as it lasts")
    parser.add_argument("--minutes", type=float, default=4.0, help="budget of the job")
    parser.add_argument("--port", type=int, default=8398)
    options = parser.parse_args()
    server = Softbatch("bfloat16", options.port)
    rates: dict[tuple[str, int], list[float]] = {}
    starts = count(0, 1000)

    def load(label: str) -> None:
        start = next(starts)
        for concurrency, requests in LOAD.items():
            figures = server.run(concurrency, requests, start + concurrency * 100)
            rates.setdefault((label, concurrency), []).append(figures["tokens_per_second"])
            print(f"{label}, concurrency {concurrency}: {figures}", file=sys.stderr, flush=True)

    try:
        server.run(8, 16, 900_000)
        for _ in range(options.rounds):
            load("alone")
        body = {"name": "cost", "context": CONTEXT.read_text(), "minutes": options.minutes}
        job = post(options.port, "/v1/compressions", body)["id"]
        while (phase := job_phase(options.port, job)) is not None:
            load(f"beside a job at {phase}")
    finally:
        server.stop()
    print("| output tokens/s, median (least to most), rounds | " + " | ".join(f"concurrency {c}" for c in LOAD) + " |")
    print("|---|" + "---|" * len(LOAD))
    for label in dict.fromkeys(label for label, _ in rates):
        cells = [rates[label, c] for c in LOAD]
        shown = [f"{statistics.median(c):.0f} ({min(c):.0f} to {max(c):.0f}), {len(c)}" for c in cells]
        print(f"| {label} | " + " | ".join(shown) + " |")


if __name__ == "__main__":
    main()
