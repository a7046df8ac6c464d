"""Who runs and who waits, seen from outside: iteration-level admission, disconnects, a queue that overflows."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from softbatch.prompt_store.manifest import ModelSpec
from softbatch.server.routes import SERVING_PATHS
from tests.chaos.disconnects import leave_at_random
from tests.support.mixed_requests import EMBEDDINGS, KEYS_AND_VALUES
from tests.support.models import Reference, make_soft_prompt, save_prompt
from tests.support.servers import Server, Site, error_of, stream_json

PROMPT = "Write a short story about a bridge"
WHOLE_CONTEXT = 16000  # more tokens than any test waits for


@pytest.fixture(scope="module")
def server(four_slots: Server) -> Server:
    return four_slots


def body(max_tokens: int, **fields: Any) -> dict[str, Any]:
    return {"prompt": PROMPT, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True} | fields


@dataclass
class Stream:
    """A streaming request that is read in the background."""

    text: str = ""
    finish_reason: str | None = None
    begun: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None

    async def close(self) -> None:
        """The client goes away."""
        assert self.task is not None
        self.task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self.task


def start(client: httpx.AsyncClient, max_tokens: int, **fields: Any) -> Stream:
    stream = Stream()

    async def read() -> None:
        request = client.stream("POST", "/v1/completions", json=body(max_tokens, stream=True, **fields))
        async with request as reply:
            assert reply.status_code == 200, await reply.aread()
            async for event in events(reply):
                stream.text += event["choices"][0]["text"]
                stream.finish_reason = event["choices"][0]["finish_reason"]
                stream.begun.set()

    stream.task = asyncio.create_task(read())
    return stream


async def events(reply: httpx.Response) -> AsyncIterator[Any]:
    async for line in reply.aiter_lines():
        if line.startswith("data: {"):
            yield json.loads(line.removeprefix("data: "))


async def until(condition: Any, what: str, seconds: float = 120) -> Any:
    """What the coroutine function `condition` returns, as soon as that is true."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := await condition():
            return found
        await asyncio.sleep(0.01)
    raise AssertionError(f"after {seconds:g} s: {what}")


async def queue_of(client: httpx.AsyncClient) -> tuple[list[Any], list[Any]]:
    queue = (await client.get("/v1/queue")).json()
    return queue["running"], queue["waiting"]


def test_the_fifth_of_four_waits_for_a_slot(server: Server, tiny_llama: Reference) -> None:
    asyncio.run(the_fifth_of_four(server, tiny_llama))
    server.wait_empty()


async def the_fifth_of_four(server: Server, reference: Reference) -> None:
    async with server.async_http() as client:
        first = start(client, 700)
        others = [start(client, WHOLE_CONTEXT) for _ in range(3)]
        for stream in (first, *others):
            await stream.begun.wait()
        with server.standing_still():  # the first does not end before all has been looked at
            fifth = start(client, 300, priority=3)

            async def one_waits() -> tuple[Any, Any] | None:
                running, waiting = await queue_of(client)
                return (running, waiting[0]) if len(waiting) == 1 else None

            running, entry = await until(one_waits, "nobody waits")
            assert first.finish_reason is None
            assert len(running) == 4
            assert {each["progress"]["max_tokens"] for each in running} == {700, WHOLE_CONTEXT}
            assert (entry["state"], entry["route"], entry["priority"]) == ("waiting", "/v1/completions", 3)
            assert entry["progress"] == {"num_computed": 0, "generated": 0, "max_tokens": 300}
            assert entry["id"] not in {each["id"] for each in running}
            assert entry["prompt_tokens"] == len(reference.tokenizer(PROMPT)["input_ids"])
            assert entry["age_seconds"] >= 0
            levels = await asyncio.to_thread(server.metrics, "requests_waiting", "requests_running", "slots")
            assert levels == (1, 4, 4)
            steps, rows = await asyncio.to_thread(server.metrics, "batch_size_count", "batch_size_sum")
            assert not fifth.begun.is_set()

        async def is_admitted() -> bool:
            running, _ = await queue_of(client)
            assert len(running) <= 4
            ids = {each["id"] for each in running}
            lengths = sorted(each["progress"]["max_tokens"] for each in running)
            assert not (entry["id"] in ids and 700 in lengths), "it was admitted before a slot was free"
            return entry["id"] in ids

        await until(is_admitted, "the fifth was never admitted")
        await fifth.begun.wait()
        steps_now, rows_now = await asyncio.to_thread(server.metrics, "batch_size_count", "batch_size_sum")
        assert fifth.finish_reason is None
        # No step ran with an empty slot: the fifth came in with the very next one.
        assert steps_now > steps
        assert rows_now - rows == 4 * (steps_now - steps)
        assert await asyncio.to_thread(server.metric, "requests_waiting") == 0
        assert first.task is not None
        await first.task
        assert first.finish_reason == "length"
        # The other three went on all the while, and still do.
        before = [len(stream.text) for stream in others]
        assert fifth.task is not None
        await fifth.task
        assert all(len(stream.text) > length > 0 for stream, length in zip(others, before, strict=True))
        assert all(stream.finish_reason is None for stream in others)
        assert {stream.text[:100] for stream in others} == {first.text[:100]}
        for stream in others:
            await stream.close()


def test_clients_that_leave_free_their_places(server: Server) -> None:
    asyncio.run(clients_that_leave(server))
    server.wait_empty()


async def clients_that_leave(server: Server) -> None:
    finished = server.metric("requests_finished_total", reason="cancelled")
    async with server.async_http() as client:
        streams = [start(client, WHOLE_CONTEXT) for _ in range(3)]
        whole = [asyncio.create_task(client.post("/v1/completions", json=body(WHOLE_CONTEXT)))]
        for stream in streams:
            await stream.begun.wait()

        async def counts(running: int, waiting: int) -> bool:
            levels = await asyncio.to_thread(server.metrics, "requests_running", "requests_waiting")
            return levels == (running, waiting)

        await until(lambda: counts(4, 0), "four do not run")
        streams.append(start(client, WHOLE_CONTEXT))
        whole.append(asyncio.create_task(client.post("/generate", json=tgi(WHOLE_CONTEXT))))
        await until(lambda: counts(4, 2), "two do not wait")
        # Those who wait leave first: streaming, then not.
        await streams.pop().close()
        await until(lambda: counts(4, 1), "the waiting stream does not leave the queue")
        whole.pop().cancel()
        await until(lambda: counts(4, 0), "the waiting request does not leave the queue")
        await streams.pop().close()
        await until(lambda: counts(3, 0), "the running stream does not leave the batch")
        whole.pop().cancel()
        await until(lambda: counts(2, 0), "the running request does not leave the batch")
        # A freed slot is of use to others.
        assert (await client.post("/v1/completions", json=body(5))).status_code == 200
        for stream in streams:
            assert stream.finish_reason is None
            await stream.close()
    server.wait_idle()
    assert server.metric("requests_finished_total", reason="cancelled") - finished == 6


def test_nothing_stays_of_clients_that_leave_at_any_moment(
    server: Server, tiny_spec: ModelSpec, tmp_path: Path
) -> None:
    """The short form of `make chaos ARGS="--only disconnects"`."""
    for name, kind in ((EMBEDDINGS, "embeddings"), (KEYS_AND_VALUES, "kv")):
        prompt = make_soft_prompt(kind, 21, tiny_spec, scale=0.5)
        assert server.upload(name, save_prompt(prompt, tmp_path, name)).status_code == 201
    findings = leave_at_random(server, 120, seed=1)
    assert all(finding.held for finding in findings), findings


def tgi(max_new_tokens: int) -> dict[str, Any]:
    return {"inputs": PROMPT, "parameters": {"max_new_tokens": max_new_tokens}}


def test_lower_priority_numbers_go_first(server: Server) -> None:
    asyncio.run(lower_priorities_first(server))
    server.wait_empty()


async def lower_priorities_first(server: Server) -> None:
    async with server.async_http() as client:
        busy = [start(client, WHOLE_CONTEXT) for _ in range(4)]
        for stream in busy:
            await stream.begun.wait()
        waiting = []
        for number, priority in enumerate((5, 0, -5)):
            waiting.append(start(client, 40, priority=priority))

            async def is_queued(count: int = number + 1) -> bool:
                return len((await queue_of(client))[1]) == count

            await until(is_queued, "a request does not wait")
        order = [entry["priority"] for entry in (await queue_of(client))[1]]
        assert order == [-5, 0, 5]
        await busy.pop().close()
        ends = []
        for stream in waiting:
            assert stream.task is not None
            stream.task.add_done_callback(lambda _, stream=stream: ends.append(waiting.index(stream)))
        await asyncio.gather(*(stream.task for stream in waiting if stream.task))
        assert ends == [2, 1, 0]
        for stream in busy:
            await stream.close()


def test_a_deleted_prompt_serves_those_who_wait(
    server: Server, tiny_llama: Reference, tiny_spec: ModelSpec, tmp_path: Path
) -> None:
    """It was never loaded before it was deleted."""
    prompt = make_soft_prompt("kv", 18, tiny_spec, scale=0.5)
    assert server.upload("deleted", save_prompt(prompt, tmp_path, "deleted")).status_code == 201
    ids = tiny_llama.tokenizer(PROMPT)["input_ids"]
    expected = tiny_llama.tokenizer.decode(tiny_llama.generate(ids, 20, prompt), skip_special_tokens=True)
    assert asyncio.run(deleted_while_waiting(server)) == expected
    server.wait_empty()
    assert not list(server.store.glob(".leases-*/*")), "its file stays behind"


async def deleted_while_waiting(server: Server) -> str:
    async with server.async_http() as client:
        busy = [start(client, WHOLE_CONTEXT) for _ in range(4)]
        for stream in busy:
            await stream.begun.wait()
        waiting = start(client, 20, model="deleted")

        async def is_queued() -> bool:
            return [entry["soft_prompt"] for entry in (await queue_of(client))[1]] == ["deleted"]

        await until(is_queued, "the request does not wait")
        assert (await client.delete("/v1/soft_prompts/deleted")).status_code == 200
        late = await client.post("/v1/completions", json=body(20, model="deleted"))
        assert late.status_code == 404
        for stream in busy:
            await stream.close()
        assert waiting.task is not None
        await waiting.task
        return waiting.text


def test_queue_overflow(two_slots: Site) -> None:
    """Ten times as many as there is room for, all at once."""
    server = two_slots.server
    num_sent, capacity, length = 60, 6, 100
    ends: list[httpx.Response] = []

    async def ask_all() -> None:
        async with server.async_http() as client:

            async def ask() -> None:
                ends.append(await client.post("/v1/completions", json=body(length)))

            await asyncio.gather(*(ask() for _ in range(num_sent)))

    async def all_others_are_refused() -> bool:
        return len(ends) == num_sent - capacity

    async def ask_while_it_stands() -> None:
        with server.standing_still():  # nobody ends while the others come
            asking = asyncio.create_task(ask_all())
            await until(all_others_are_refused, "not all who find no room hear of it")
        await asking

    asyncio.run(ask_while_it_stands())
    accepted = [reply for reply in ends if reply.status_code == 200]
    rejected = [reply for reply in ends if reply.status_code == 429]
    assert (len(accepted), len(rejected)) == (capacity, num_sent - capacity)
    # At once: before any of those that were let in had ended.
    assert [reply.status_code for reply in ends[: len(rejected)]] == [429] * len(rejected)
    for reply in rejected:
        error = error_of(reply)
        assert (error["type"], error["code"]) == ("requests", "rate_limit_exceeded")
        assert "4 requests" in error["message"]
        assert 1 <= int(reply.headers["retry-after"]) <= 60
    assert len({reply.json()["choices"][0]["text"] for reply in accepted}) == 1
    assert all(reply.json()["usage"]["completion_tokens"] == length for reply in accepted)

    server.wait_empty()
    assert server.metric("requests_rejected_total", reason="queue_full") == len(rejected)
    assert server.metric("requests_finished_total", reason="length") == len(accepted)
    assert server.metric("requests_finished_total") + server.metric("requests_rejected_total") == num_sent
    assert server.metric("generation_tokens_total") == length * len(accepted)
    assert server.metrics("queue_time_seconds_count", "e2e_request_latency_seconds_count") == (len(accepted),) * 2
    choices_take_places(server, capacity)


def choices_take_places(server: Server, capacity: int) -> None:
    """A request of several choices is let in whole or not at all, and a refused one keeps no place."""
    with httpx.Client(base_url=server.url, timeout=120) as other:
        for _ in range(capacity + 1):
            assert other.post("/v1/completions", json=body(5, soft_prompt="nobody")).status_code == 404
            assert other.post("/v1/completions", json=body(10**6)).status_code == 400
        assert other.post("/v1/completions", json=body(5, n=capacity)).status_code == 200, "places are lost"
        with server.http.stream("POST", "/v1/completions", json=body(WHOLE_CONTEXT, stream=True)) as stream:
            lines = stream.iter_lines()  # closes the connection when it goes away
            next(lines)
            for _ in range(3):
                assert other.post("/v1/completions", json=body(5, n=capacity)).status_code == 429
            assert other.post("/v1/completions", json=body(5, n=capacity - 1)).status_code == 200
        server.wait_empty()
        with server.http.stream("POST", "/v1/completions", json=body(WHOLE_CONTEXT, stream=True, n=capacity)) as stream:
            lines = stream.iter_lines()
            next(lines)
            for path in SERVING_PATHS:
                assert other.post(path, content=b"no JSON").status_code == 429, "a full server reads what it refuses"
            assert other.post("/tokenize", json={"prompt": PROMPT}).status_code == 200
        server.wait_empty()
        reply = other.post("/v1/completions", json=body(5, n=capacity + 1))
        assert reply.status_code == 400, "waiting would not help"
        assert f"takes {capacity} at the most" in error_of(reply)["message"]
    server.wait_empty()


def late(path: str, timeout_ms: int, **fields: Any) -> dict[str, Any]:
    """A request for far more than it has time for."""
    if path == "/v1/completions":
        return body(WHOLE_CONTEXT, timeout_ms=timeout_ms) | fields
    if path == "/v1/chat/completions":
        chat = body(WHOLE_CONTEXT, timeout_ms=timeout_ms, messages=[{"role": "user", "content": PROMPT}]) | fields
        del chat["prompt"]
        return chat
    parameters = {"max_new_tokens": WHOLE_CONTEXT, "timeout_ms": timeout_ms, "details": True, "ignore_eos_token": True}
    return {"inputs": PROMPT, "parameters": parameters}


def begun_but_late(server: Server, path: str, **fields: Any) -> Any:
    """The reply, or a stream's events, to a request that runs when its time is over: a busy machine begins later."""
    for timeout_ms in (700, 2100, 6300, 18_900):
        asked = late(path, timeout_ms, **fields)
        if asked.get("stream") or path == "/generate_stream":
            events = stream_json(server, path, asked)
            if "error" not in events[0]:
                return events
        elif (reply := server.post(path, asked)).status_code != 504:
            assert reply.status_code == 200, reply.text
            return reply.json()
    raise AssertionError("it never began to run")


def test_who_runs_at_its_deadline_ends_with_its_output(server: Server) -> None:
    whole = server.complete(PROMPT, 40, ignore_eos=True)
    reply = begun_but_late(server, "/v1/completions", n=2)
    for choice in reply["choices"]:
        assert (choice["finish_reason"], choice["stop_reason"]) == ("length", "timeout")
        assert choice["text"].startswith(whole[:20])
    assert 2 <= reply["usage"]["completion_tokens"] < 2 * WHOLE_CONTEXT

    options = {"include_usage": True}
    *_, last, usage, done = begun_but_late(server, "/v1/chat/completions", stream=True, stream_options=options)
    assert done == "[DONE]"
    assert (last["choices"][0]["finish_reason"], last["choices"][0]["stop_reason"]) == ("length", "timeout")
    assert 1 <= usage["usage"]["completion_tokens"] < WHOLE_CONTEXT

    details = begun_but_late(server, "/generate")["details"]
    assert (details["finish_reason"], details["stop_reason"]) == ("length", "timeout")
    assert details["generated_tokens"] == len(details["tokens"]) > 0
    events = begun_but_late(server, "/generate_stream")
    assert (events[-1]["details"]["finish_reason"], events[-1]["details"]["stop_reason"]) == ("length", "timeout")
    assert events[-1]["generated_text"] == "".join(event["token"]["text"] for event in events)
    server.wait_empty()
    assert server.metric("requests_finished_total", reason="timeout") == 5


def test_who_waits_at_its_deadline_gets_504_and_never_runs(server: Server) -> None:
    asyncio.run(waits_in_vain(server))
    server.wait_empty()


async def waits_in_vain(server: Server) -> None:
    async with server.async_http() as client:
        busy = [start(client, WHOLE_CONTEXT) for _ in range(4)]
        for stream in busy:
            await stream.begun.wait()
        prompts = await asyncio.to_thread(server.metric, "prompt_tokens_total")
        for path in ("/v1/completions", "/v1/chat/completions", "/generate"):
            reply = await client.post(path, json=late(path, 200))
            assert (reply.status_code, error_of(reply)["code"]) == (504, "deadline_exceeded")
            assert reply.headers["x-should-retry"] == "false"
        request = client.stream("POST", "/v1/completions", json=late("/v1/completions", 200, stream=True))
        async with request as streamed:
            assert [event["error"]["code"] async for event in events(streamed)] == ["deadline_exceeded"]
        assert await asyncio.to_thread(server.metric, "prompt_tokens_total") == prompts
        for stream in busy:
            assert stream.finish_reason is None
            await stream.close()


def test_a_user_who_sends_much_does_not_hold_up_another(server: Server) -> None:
    asyncio.run(light_beside_heavy(server))
    server.wait_empty()


async def light_beside_heavy(server: Server) -> None:
    async with server.async_http() as client:

        async def are_there(count: int) -> bool:
            return len((await queue_of(client))[1]) == count

        with server.standing_still():
            heavy = [start(client, 150, user="heavy") for _ in range(50)]
            await until(lambda: are_there(50), "the heavy user does not fill the queue")
            light = start(client, 5, user="light")
            await until(lambda: are_there(51), "the light user does not wait")
        assert light.task is not None
        await light.task
        # Those of the four slots had begun before, and may have ended in one step with four others.
        assert sum(stream.finish_reason is not None for stream in heavy) <= 16
        for stream in heavy:
            await stream.close()
