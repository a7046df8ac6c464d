"""A replica whose engine cannot be kept alive."""

from __future__ import annotations

import asyncio

import pytest

from softbatch.server.cluster.model_replica import end_with_engine
from tests.support.in_process_engine import InProcessEngine, active_request


def test_a_replica_ends_before_anybody_hears_of_its_engine() -> None:
    """Another replica goes on with what is answered by no one, not with what was answered 503."""

    async def check() -> None:
        engine = InProcessEngine()
        request = active_request("a")
        engine.client.submit(request)
        reading = asyncio.create_task(anext(engine.client.outputs(request)))
        await asyncio.sleep(0)
        ended: list[tuple[int, bool]] = []
        end_with_engine(engine.client, lambda status: ended.append((status, reading.done())))
        engine.client.engine_given_up("the engine died")
        assert ended == [(1, False)]
        await asyncio.gather(reading, return_exceptions=True)

    asyncio.run(check())


def test_a_replica_without_an_engine_does_not_begin() -> None:
    async def check() -> None:
        engine = InProcessEngine()
        engine.gave_up = True
        with pytest.raises(RuntimeError, match="kept alive"):
            end_with_engine(engine.client)

    asyncio.run(check())
