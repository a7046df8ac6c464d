"""A router in front of replicas that speak once a second, each of which holds so many soft prompts."""

from __future__ import annotations

import math
import random
from collections import OrderedDict

import pytest

from softbatch.server.cluster.affinity import SOFT_PROMPT_BOUND, ReplicaLoad, ranked
from softbatch.server.cluster.residency import FRESH_SECONDS, LOAD_SECONDS, Residency

PLACES = 20


class Replica:
    """Evicts what was used longest ago; has room for the blocks of requests beside its soft prompts."""

    def __init__(self) -> None:
        self.held: OrderedDict[str, None] = OrderedDict()

    def use(self, name: str) -> bool:
        is_hit = name in self.held
        self.held[name] = None
        self.held.move_to_end(name)
        if len(self.held) > PLACES:
            self.held.popitem(last=False)
        return is_hit

    def stats(self, now: float) -> dict[str, object]:
        return {"at": now, "held": list(self.held), "room": PLACES - len(self.held) if self.held else math.inf}


def hit_rate(seed: int, rate: float, num_names: int) -> float:
    """Of the second half of 20 questions about each, in random order."""
    rng, routing = random.Random(seed), Residency()
    replicas = {f"r{seed}-{number}": Replica() for number in range(2)}
    names, hits = [f"{seed}/{number}" for number in range(num_names)] * 20, []
    rng.shuffle(names)
    spoken = {key: replica.stats(0.5) for key, replica in replicas.items()}
    for at, name in enumerate(names):
        now = 1 + at / rate
        for number, (key, replica) in enumerate(replicas.items()):
            if now - float(str(spoken[key]["at"])) >= 1 + 0.1 * number:
                spoken[key] = replica.stats(now)
            routing.take(key, spoken[key], now)
        loads = [ReplicaLoad(key, 0, int(routing.holds(key, name)), has_room=routing.has_room(key)) for key in replicas]
        chosen = ranked(name, loads, SOFT_PROMPT_BOUND)[0][0]
        routing.sent(chosen, name, now)
        hits.append(replicas[chosen].use(name))
    counted = hits[len(hits) // 2 :]
    return sum(counted) / len(counted)


@pytest.mark.parametrize("rate", [5, 30, 200])
def test_what_fits_into_all_replicas_together_is_found_however_fast_it_is_asked_for(rate: float) -> None:
    assert min(hit_rate(seed, rate, 2 * PLACES) for seed in range(20)) > 0.95


def test_what_does_not_fit_is_found_as_often_as_there_are_places() -> None:
    rates = [hit_rate(seed, 30, 3 * PLACES) for seed in range(10)]
    assert sum(rates) / len(rates) > 0.55


def test_what_a_replica_was_sent_takes_its_room_until_it_has_spoken_of_it() -> None:
    routing = Residency()
    routing.take("one", {"at": 100.0, "held": ["a"], "room": 1}, 100.1)
    assert routing.has_room("one")
    routing.sent("one", "a", 100.2)
    assert routing.has_room("one"), "it had that"
    routing.sent("one", "b", 100.2)
    assert routing.holds("one", "b")
    assert not routing.has_room("one")
    routing.take("one", {"at": 100.3, "held": ["a"], "room": 1}, 100.4)
    assert routing.holds("one", "b"), "it is being loaded"
    routing.take("one", {"at": 100.3 + LOAD_SECONDS, "held": ["a"], "room": 1}, 101.4)
    assert not routing.holds("one", "b"), "it was evicted"
    assert routing.has_room("one")


def test_a_replica_that_says_nothing_holds_what_it_was_sent_for_a_while() -> None:
    routing = Residency()
    routing.sent("one", "a", 100.0)
    for later, holds in ((0.0, True), (FRESH_SECONDS, False)):
        routing.take("one", {}, 100.0 + later)
        assert routing.holds("one", "a") == holds
    routing.keep(["two", "three"])
    routing.take("four", {"at": 1.0, "held": ["b"]}, 2.0)
    routing.keep([])
    assert not routing.holds("four", "b")
