"""Many replicas behind a router, without the machines: each runs the real scheduler, and a clock stands for the model.

Soft prompts are asked for as Zipf has it. Who is asked for more often than one replica can answer, how often a soft
prompt is resident where its request goes, and how long the first token takes, by how many replicas there are and how
requests are routed. Replicas begin with what they would hold after a while.

    python -m benchmarks.scaling.simulate --output docs/plots/scaling.svg
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from benchmarks.scaling.replica import Asked, Machine, Replica
from benchmarks.scaling.routing import POLICIES, home

VIRTUAL_TOKENS = 128
PROMPT_TOKENS = 32
OUTPUT_TOKENS = 16
# Of the requests, at the beginning, that do not count: until then the queues fill.
WARM_PART = 0.2


@dataclass(frozen=True)
class Load:
    """`rate` is requests a second for each replica, of which so many are sent, and `least` in all; popularity:
    1 / rank^exponent."""

    soft_prompts: int
    exponent: float
    rate: float
    requests: int
    least: int = 0


@dataclass(frozen=True)
class Outcome:
    """Seconds until the first token, the share of requests that found their soft prompt resident, the bytes of
    different soft prompts in all KV blocks together, and the busiest replica's requests beside the mean."""

    replicas: int
    policy: str
    median: float
    p99: float
    hit_rate: float
    bytes_held: int
    copies: float
    imbalance: float


def popularity(load: Load) -> list[float]:
    """Cumulative weights, the most popular first."""
    return list(itertools.accumulate(1 / rank**load.exponent for rank in range(1, load.soft_prompts + 1)))


def simulate(replicas: int, policy: str, load: Load, machine: Machine, seed: int = 0) -> Outcome:
    rng = random.Random(seed)
    cluster = [Replica(machine, VIRTUAL_TOKENS, PROMPT_TOKENS, OUTPUT_TOKENS) for _ in range(replicas)]
    _warm(cluster, policy, load)
    before = [(r.scheduler.soft_prompts.hits, r.scheduler.soft_prompts.misses) for r in cluster]
    asked = _run(cluster, policy, load, rng)
    counted = asked[int(WARM_PART * len(asked)) :]
    first = sorted(a.first_token - a.arrived for a in counted if a.first_token is not None)
    hits = sum(r.scheduler.soft_prompts.hits - h for r, (h, _) in zip(cluster, before, strict=True))
    misses = sum(r.scheduler.soft_prompts.misses - m for r, (_, m) in zip(cluster, before, strict=True))
    resident = [prompt.ref.sha256 for r in cluster for prompt in r.scheduler.soft_prompts.all()]
    loads = [0] * replicas
    for one in asked:
        loads[one.replica] += 1
    bytes_each = -(-VIRTUAL_TOKENS // machine.block_size) * machine.bytes_per_block
    return Outcome(
        replicas=replicas,
        policy=policy,
        median=first[len(first) // 2],
        p99=first[int(0.99 * (len(first) - 1))],
        hit_rate=hits / max(1, hits + misses),
        bytes_held=len(set(resident)) * bytes_each,
        copies=len(resident) / max(1, len(set(resident))),
        imbalance=max(loads) * replicas / len(asked),
    )


def _warm(cluster: Sequence[Replica], policy: str, load: Load) -> None:
    """With affinity a replica holds the most popular of those whose home it is, otherwise those of all."""
    room = cluster[0].room_for_soft_prompts()
    if "affinity" not in policy:
        for replica in cluster:
            replica.warm(range(min(room, load.soft_prompts)))
        return
    homes: list[list[int]] = [[] for _ in cluster]
    for soft_prompt in range(load.soft_prompts):
        of_replica = homes[home(soft_prompt, 0, len(cluster))]
        if len(of_replica) < room:
            of_replica.append(soft_prompt)
    for replica, own in zip(cluster, homes, strict=True):
        replica.warm(own)


def _run(cluster: Sequence[Replica], policy: str, load: Load, rng: random.Random) -> list[Asked]:
    route = POLICIES[policy](len(cluster), random.Random(len(cluster)))
    weights = popularity(load)
    numbers = itertools.count()
    events: list[tuple[float, int, int]] = []  # when, what makes it unique, the replica whose step ends then
    outstanding = [0] * len(cluster)
    asked: list[Asked] = []
    now = 0.0

    def advance(index: int, at: float) -> None:
        following = cluster[index].advance(at)
        outstanding[index] = cluster[index].outstanding
        if following is not None:
            heapq.heappush(events, (following, next(numbers), index))

    while len(asked) < max(load.requests * len(cluster), load.least):
        now += rng.expovariate(load.rate * len(cluster))
        while events and events[0][0] <= now:
            at, _, index = heapq.heappop(events)
            advance(index, at)
        (soft_prompt,) = rng.choices(range(load.soft_prompts), cum_weights=weights)
        one = Asked(now, soft_prompt, route(soft_prompt, outstanding))
        cluster[one.replica].add(f"r{len(asked)}", one)
        outstanding[one.replica] += 1
        asked.append(one)
        advance(one.replica, now)
    while events:
        at, _, index = heapq.heappop(events)
        advance(index, at)
    return asked


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    machine = Machine()
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 8, 64, 1000])
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=list(POLICIES))
    parser.add_argument("--soft-prompts", type=int, default=100_000)
    parser.add_argument("--exponent", type=float, default=1.0, help="of the popularity, 1 / rank^exponent")
    parser.add_argument("--rate", type=float, default=20.0, help="requests a second for each replica")
    parser.add_argument("--requests", type=int, default=60, help="for each replica, and 6000 in all at least")
    parser.add_argument(
        "--load", type=float, default=machine.load, help="seconds to bring a soft prompt from the store"
    )
    parser.add_argument("--kv-blocks", type=int, default=machine.kv_blocks)
    parser.add_argument("--results", type=Path, help="JSON of outcomes: those that are there are kept, and drawn too")
    parser.add_argument("--output", type=Path, help="an SVG of the curves")
    options = parser.parse_args()
    machine = replace(machine, load=options.load, kv_blocks=options.kv_blocks)
    load = Load(options.soft_prompts, options.exponent, options.rate, options.requests, least=6000)
    print("| replicas | routing | first token p50, ms | p99, ms | hit rate | distinct, GiB | copies | busiest |")
    print("|---|---|---|---|---|---|---|---|")
    outcomes: list[Outcome] = []
    if options.results and options.results.exists():
        outcomes = msgspec.json.decode(options.results.read_bytes(), type=list[Outcome])
    for count in options.replicas:
        for policy in options.policies:
            outcomes.append(outcome := simulate(count, policy, load, machine))
            print(_row(outcome), flush=True)
            if options.results:
                options.results.write_bytes(msgspec.json.encode(outcomes))
    if options.output:
        _draw(outcomes, options.output)
    return 0


def _row(outcome: Outcome) -> str:
    held = outcome.bytes_held / 2**30
    return (
        f"| {outcome.replicas:,} | {outcome.policy} | {1000 * outcome.median:.0f} | {1000 * outcome.p99:,.0f} "
        f"| {outcome.hit_rate:.2f} | {held:.1f} | {outcome.copies:.1f} | {outcome.imbalance:.1f} |"
    )


def _draw(outcomes: Sequence[Outcome], target: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, (hits, waits) = pyplot.subplots(1, 2, figsize=(9, 3.4))
    for policy in dict.fromkeys(outcome.policy for outcome in outcomes):
        own = sorted((each for each in outcomes if each.policy == policy), key=lambda each: each.replicas)
        counts = [outcome.replicas for outcome in own]
        hits.plot(counts, [outcome.hit_rate for outcome in own], marker="o", markersize=4, label=policy)
        waits.plot(counts, [1000 * outcome.p99 for outcome in own], marker="o", markersize=4, label=policy)
    for axes, label in ((hits, "share of requests whose soft prompt is resident"), (waits, "first token p99, ms")):
        counts = sorted({outcome.replicas for outcome in outcomes})
        axes.set_xscale("log", base=2)
        axes.set_xticks(counts, [f"{count:,}" for count in counts])
        axes.set_xlabel("replicas")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    hits.set_ylim(0, 1.02)
    waits.set_yscale("log")
    hits.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(target, metadata={"Date": None})


if __name__ == "__main__":
    sys.exit(main())
