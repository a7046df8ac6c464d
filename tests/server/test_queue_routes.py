"""`/v1/queue*` on an app whose engine takes a step when a test says so: who sees, who cancels, who watches."""

from __future__ import annotations

import asyncio
import hashlib
import json
from types import SimpleNamespace
from typing import Any, cast

import pytest
from fastapi.testclient import TestClient

from softbatch.server.app import create_app
from softbatch.server.observability.history import MAX_SAMPLES, History
from softbatch.server.observability.live_feed import BEAT_SECONDS, LiveFeed
from softbatch.server.observability.metrics import Metrics
from softbatch.server.request_failures import RequestCancelled
from softbatch.server.requests.active_request import ActiveRequest
from softbatch.server.services import Services
from softbatch.server.settings import Settings
from tests.support.in_process_engine import InProcessEngine, active_request


class Words:
    """Shows token ids as they are."""

    def decode(self, token_ids: list[int], skip_special_tokens: bool) -> str:
        return " ".join(map(str, token_ids))


def app_of(engine: InProcessEngine, **settings: Any) -> TestClient:
    services = SimpleNamespace(
        tracing=None,
        settings=Settings.model_construct(max_batch_size=2, **settings),
        engine=engine.client,
        supervisor=engine,
        admission=SimpleNamespace(draining=True),  # a stream of events ends by itself
        live=LiveFeed(engine.metrics, lambda: True),
        text=Words(),
    )
    return TestClient(create_app(cast(Services, services)))


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.fixture
def engine() -> InProcessEngine:
    """Two of three requests have a slot."""
    engine = InProcessEngine(slots=2)
    for name in ("first", "second", "third"):
        engine.client.submit(active_request(name))
    engine.step()
    return engine


def test_a_request_is_shown_with_its_text(engine: InProcessEngine) -> None:
    found = app_of(engine).get("/v1/queue/first").json()
    assert (found["state"], found["prompt"], found["is_cut"]) == ("running", "1 2 3", False)
    assert len(found["output"].split()) == 1


def test_a_cancelled_one_leaves_batch_or_queue_and_its_client_is_told(engine: InProcessEngine) -> None:
    client = app_of(engine)
    requests = dict(engine.client.active)
    for name in ("first", "third"):
        assert client.delete(f"/v1/queue/{name}").json() == {"id": name, "cancelled": True}
        assert client.delete(f"/v1/queue/{name}").status_code == 404
        assert isinstance(requests[name].error, RequestCancelled)
    assert engine.step() == {"second"}
    assert engine.finished("cancelled") == 2

    async def read(request: ActiveRequest) -> list[Any]:
        return [batch async for batch in engine.client.outputs(request)]

    with pytest.raises(RequestCancelled):
        asyncio.run(read(requests["first"]))


def test_unknown_ones_get_404(engine: InProcessEngine) -> None:
    reply = app_of(engine).get("/v1/queue/nobody")
    assert (reply.status_code, reply.json()["error"]["code"]) == (404, "request_not_found")


@pytest.mark.parametrize("method", ["GET", "DELETE"])
def test_a_key_reaches_its_own_requests_and_an_admin_key_all(engine: InProcessEngine, method: str) -> None:
    client = app_of(engine, api_key=("one", "two"), admin_key=("root",))
    for name, key in (("first", "one"), ("second", "two")):
        engine.client.active[name].owner = hashlib.sha256(key.encode()).hexdigest()[:12]
    assert client.get("/v1/queue", headers=bearer("one")).json()["others_running"] == 1
    assert client.request(method, "/v1/queue/first", headers=bearer("two")).status_code == 404
    assert client.request(method, "/v1/queue/first").status_code == 401
    assert client.request(method, "/v1/queue/first", headers=bearer("one")).status_code == 200
    assert client.request(method, "/v1/queue/second", headers=bearer("root")).status_code == 200


def test_the_first_event_has_the_batch_and_the_history(engine: InProcessEngine) -> None:
    reply = app_of(engine).get("/v1/queue/events")
    assert reply.headers["content-type"].startswith("text/event-stream")
    event = json.loads(reply.text.split("\n")[0].removeprefix("data: "))
    assert (event["engine"], event["num_running"], event["num_waiting"]) == ("draining", 2, 1)
    assert [entry["id"] for entry in event["queue"]["running"]] == ["first", "second"]
    assert [entry["id"] for entry in event["queue"]["waiting"]] == ["third"]
    assert event["history"]["at"] == []


def test_all_who_watch_share_one_beat_and_without_any_there_is_none() -> None:
    async def run() -> None:
        feed = LiveFeed(Metrics(), lambda: False)
        made = []

        async def watch(beats: int) -> None:
            watching = feed.watch()
            for _ in range(beats):
                beat = await anext(watching)
                beat.shared("key", lambda: made.append(1) or b"")  # type: ignore[func-returns-value]
            await watching.aclose()

        await asyncio.gather(*(watch(3) for _ in range(20)))
        assert len(made) == 20 + 2, "each has a first look of its own, and two beats are shared"
        assert feed._beating is None

    asyncio.run(run())
    assert BEAT_SECONDS >= 0.2


def test_who_leaves_takes_nobody_along() -> None:
    async def run() -> None:
        feed = LiveFeed(Metrics(), lambda: False)
        staying = feed.watch()
        await anext(staying)
        leaving = feed.watch()
        await anext(leaving)
        waiting = asyncio.create_task(anext(leaving))  # type: ignore[arg-type]
        still = asyncio.create_task(anext(staying))  # type: ignore[arg-type]
        await asyncio.sleep(0)
        waiting.cancel()
        await still
        await staying.aclose()

    asyncio.run(run())


def test_history_counts_what_is_new_and_is_bounded() -> None:
    metrics = Metrics()
    metrics.watch(waiting=lambda: 4, running=lambda: 2, registered=lambda: 0)
    metrics.generation_tokens.inc(1000)
    metrics.requests_rejected.labels("queue_full").inc(7)
    history = History(metrics)
    history.take()
    metrics.generation_tokens.inc(5)
    metrics.requests_rejected.labels("queue_full").inc(1)
    metrics.requests_rejected.labels("key_queue_full").inc(2)
    metrics.preemptions.inc(4)
    metrics.first_token.observe(0.5)
    metrics.first_token.observe(1.5)
    metrics.kv_usage.set(0.25)
    history.take()
    before, after = history.since(0)
    assert (before.rejections, before.first_token_seconds, before.tokens_per_second) == (0, None, 0)
    assert after.tokens_per_second > 0
    assert (after.rejections, after.preemptions, after.first_token_seconds, after.kv_usage) == (3, 4, 1.0, 0.25)
    assert (after.running, after.waiting) == (2, 4)
    assert history.since(after.at) == []
    for _ in range(MAX_SAMPLES + 1):
        history.take()
    assert len(history.since(0)) == MAX_SAMPLES
