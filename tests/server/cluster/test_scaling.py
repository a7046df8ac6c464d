"""How many replicas are wanted, by what replicas say of themselves."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from softbatch.scheduler.protocol import MAX_PRIORITY
from softbatch.server.cluster.first_token_watch import FirstTokenWatch
from softbatch.server.cluster.scaling_policy import FIRST_TOKEN_SECONDS, FIRST_TOKENS, ScalingPolicy
from tests.support.in_process_engine import InProcessEngine, active_request


def context(running: int, requests: float, said: dict[str, Any] | None = None) -> SimpleNamespace:
    config = SimpleNamespace(get_target_ongoing_requests=lambda: 10.0)
    return SimpleNamespace(
        current_num_replicas=running,
        target_num_replicas=3,
        total_num_requests=requests,
        config=config,
        aggregated_metrics=said,
    )


def waits(*seconds_and_counts: tuple[float, float]) -> dict[str, Any]:
    """Of each replica, per interval."""
    return {
        FIRST_TOKENS: {at: count for at, (_, count) in enumerate(seconds_and_counts)},
        FIRST_TOKEN_SECONDS: {at: seconds * count for at, (seconds, count) in enumerate(seconds_and_counts)},
    }


@pytest.mark.parametrize(
    ("running", "requests", "said", "wanted"),
    [
        (2, 40, None, 4),
        (2, 1, {}, 0.1),
        (2, 0, waits((0, 0), (0, 0)), 0),
        (2, 5, waits((0.1, 4), (0.1, 2)), 0.5),  # they wait for little: the requests decide
        (2, 5, waits((0.8, 4), (0.8, 2)), 2),  # with fewer they would wait too long
        (2, 5, waits((1.5, 4), (1.5, 2)), 3),
        (2, 5, waits((0.1, 9), (1.0, 1)), 0.5),  # by requests, not by replicas
        (2, 5, waits((60.0, 4)), 4),
        (2, 90, waits((60.0, 4)), 9),
        (0, 0, None, 3),
    ],
)
def test_the_larger_of_two_numbers_is_wanted(running: int, requests: float, said: Any, wanted: float) -> None:
    assert ScalingPolicy(first_token_seconds=1.0)(context(running, requests, said)) == (wanted, {})


def test_those_who_have_waited_since_the_last_look_count_and_lines_of_batches_do_not() -> None:
    async def check() -> None:
        engine = InProcessEngine(slots=8)
        watch = FirstTokenWatch(engine.metrics, engine.client)
        assert watch.take() == {FIRST_TOKENS: 0, FIRST_TOKEN_SECONDS: 0}
        engine.metrics.first_token.observe(2.0)
        engine.metrics.first_token.observe(4.0)
        assert watch.take() == {FIRST_TOKENS: 2, FIRST_TOKEN_SECONDS: 6.0}
        requests = [active_request("chat"), active_request("line"), active_request("scored", max_tokens=0)]
        requests[1].add = msgspec.structs.replace(requests[1].add, priority=MAX_PRIORITY + 1)
        requests[2].add = msgspec.structs.replace(requests[2].add, score_from=1)
        for request in requests:
            request.arrived = time.monotonic() - 10
            engine.client.submit(request)
        for admitted in ([], ["chat", "line", "scored"]):  # in the queue, and while their prompts are computed
            engine.client.engine_admitting(admitted)
            found = watch.take()
            assert found[FIRST_TOKENS] == 1
            assert found[FIRST_TOKEN_SECONDS] >= 10
        requests[0].arrived = time.monotonic() + 10
        assert watch.take()[FIRST_TOKENS] == 0, "it came just now"
        requests[0].arrived = time.monotonic() - 10
        engine.client.cancel(requests[2], "cancelled")
        engine.step()
        assert requests[0].first_token is not None
        assert watch.take()[FIRST_TOKENS] == 1, "its wait is over, and counted once"
        assert watch.take()[FIRST_TOKENS] == 0

    asyncio.run(check())
