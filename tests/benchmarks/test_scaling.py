"""The simulated cluster: every request is answered, and routing does what it says."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from benchmarks.scaling.replica import Machine
from benchmarks.scaling.routing import LEAST_OVERLOAD, POLICIES, affinity, home
from benchmarks.scaling.simulate import Load, simulate

MACHINE = replace(Machine(), kv_blocks=400, slots=8)
LOAD = Load(soft_prompts=200, exponent=1.0, rate=15.0, requests=120)


@pytest.mark.parametrize("policy", POLICIES)
def test_every_request_is_answered_and_one_replica_is_the_same_for_all(policy: str) -> None:
    outcome = simulate(1, policy, LOAD, MACHINE)
    assert outcome == replace(simulate(1, "random", LOAD, MACHINE), policy=policy)
    assert 0 < outcome.hit_rate < 1
    assert 0 < outcome.median <= outcome.p99


def test_affinity_holds_more_different_soft_prompts_and_finds_them() -> None:
    by_home, blind = (simulate(4, policy, LOAD, MACHINE) for policy in ("affinity", "round robin"))
    assert by_home.hit_rate > blind.hit_rate + 0.1
    assert by_home.bytes_held > blind.bytes_held
    assert by_home.copies < blind.copies


def test_a_popular_soft_prompt_spreads_when_its_replica_is_overloaded() -> None:
    route, outstanding = affinity(4, random.Random(0)), [0] * 4
    first = home(7, 0, 4)
    assert route(7, outstanding) == first
    outstanding[first] = LEAST_OVERLOAD
    assert route(7, outstanding) != first
    assert route(7, [50] * 4) == first
