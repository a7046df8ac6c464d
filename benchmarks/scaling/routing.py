"""Which replica a request goes to: what a router in front of replicas may do."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Sequence

# (soft prompt, outstanding requests of each replica) -> replica
Route = Callable[[int, Sequence[int]], int]
# A replica is overloaded with more than so many times the mean of all, and more than so many.
OVERLOAD = 1.5
LEAST_OVERLOAD = 8


def home(soft_prompt: int, attempt: int, replicas: int) -> int:
    """The replicas of a soft prompt in the order in which it spreads over them."""
    return zlib.crc32(f"{soft_prompt}/{attempt}".encode()) % replicas


def round_robin(replicas: int, rng: random.Random) -> Route:
    turn = rng.randrange(replicas)

    def route(_: int, __: Sequence[int]) -> int:
        nonlocal turn
        turn = (turn + 1) % replicas
        return turn

    return route


def at_random(replicas: int, rng: random.Random) -> Route:
    """The better of two that are drawn: what Ray Serve and many proxies do by default."""

    def route(_: int, outstanding: Sequence[int]) -> int:
        one, two = rng.randrange(replicas), rng.randrange(replicas)
        return one if outstanding[one] <= outstanding[two] else two

    return route


def strict(replicas: int, rng: random.Random) -> Route:
    """A soft prompt has one replica, however busy that is."""
    return lambda soft_prompt, _: home(soft_prompt, 0, replicas)


def affinity(replicas: int, rng: random.Random) -> Route:
    """The first replica of its soft prompt that is not overloaded: a popular one spreads by itself."""

    def route(soft_prompt: int, outstanding: Sequence[int]) -> int:
        limit = max(LEAST_OVERLOAD, OVERLOAD * sum(outstanding) / replicas)
        for attempt in range(2 * replicas):
            chosen = home(soft_prompt, attempt, replicas)
            if outstanding[chosen] < limit:
                return chosen
        return min(range(replicas), key=outstanding.__getitem__)

    return route


POLICIES = {"affinity": affinity, "strict affinity": strict, "round robin": round_robin, "random": at_random}
