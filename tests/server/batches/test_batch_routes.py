"""`/v1/files` and `/v1/batches` by OpenAI's own client, around a route that answers without an engine."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, cast

import httpx
import openai
import pytest
from fastapi import APIRouter, FastAPI
from openai import AsyncOpenAI

from softbatch.server.app import create_app
from softbatch.server.batches.batch_queue import BatchLimits, BatchQueue
from softbatch.server.http.inner_request import InnerApp
from softbatch.server.observability.metrics import Metrics
from softbatch.server.observability.request_record import current
from softbatch.server.services import Services
from softbatch.server.settings import Settings

URL: Literal["/v1/completions"] = "/v1/completions"
MAX_BYTES = 100_000
LINES = b"\n".join(
    json.dumps({"custom_id": f"q{i}", "method": "POST", "url": URL, "body": {"prompt": f"{i}"}}).encode()
    for i in range(20)
)
answering = APIRouter()


@answering.post(URL)
async def answer(body: dict[str, Any]) -> dict[str, Any]:
    record = current()
    return {"prompt": body["prompt"], "owner": record.owner, "is_background": record.is_background}


def run(root: Path, test: Callable[[FastAPI], Awaitable[None]]) -> None:
    async def main() -> None:
        metrics = Metrics()
        limits = BatchLimits(max_lines=100, max_file_bytes=MAX_BYTES, concurrency=4)
        async with BatchQueue(root, limits, metrics, lambda: False).running() as queue:
            services = SimpleNamespace(
                settings=Settings.model_validate(
                    {"max_batch_file_bytes": MAX_BYTES, "api_key": ("one", "two"), "admin_key": ("root",)}
                ),
                batches=queue,
                metrics=metrics,
                admission=SimpleNamespace(check_room=lambda: None),
                tracing=None,
            )
            queue.begin(InnerApp(services, (answering,)).ask)
            await test(create_app(cast(Services, services)))

    asyncio.run(main())


def client(app: FastAPI, key: str) -> AsyncOpenAI:
    http: Any = httpx.AsyncClient(transport=httpx.ASGITransport(app))
    return AsyncOpenAI(base_url="http://test/v1", api_key=key, max_retries=0, http_client=http)


def test_files_are_listed_read_and_deleted(tmp_path: Path) -> None:
    async def test(app: FastAPI) -> None:
        one = client(app, "one")
        kept = openai.types.file_create_params.ExpiresAfter(anchor="created_at", seconds=3600)
        files = [
            await one.files.create(file=(f"../{i} ä.jsonl", LINES), purpose="batch", expires_after=kept)
            for i in range(3)
        ]
        assert (files[0].filename, files[0].bytes, files[0].purpose) == ("0 ä.jsonl", len(LINES), "batch")
        assert files[0].expires_at == files[0].created_at + 3600
        ids = [file.id for file in files]
        page = await one.files.list(limit=2, purpose="batch")
        assert ([file.id for file in page.data], page.has_more) == (ids[:0:-1], True)
        assert [file.id for file in (await page.get_next_page()).data] == ids[:1]
        assert [file.id async for file in one.files.list(order="asc", after=ids[0])] == ids[1:]
        assert await one.files.retrieve(ids[1]) == files[1]
        assert (await one.files.content(ids[1])).content == LINES
        assert (await one.files.delete(ids[1])).deleted
        for call in (one.files.retrieve, one.files.content, one.files.delete):
            with pytest.raises(openai.NotFoundError) as missing:
                await call(ids[1])
            assert missing.value.code == "file_not_found"
        with pytest.raises(openai.APIStatusError) as large:
            await one.files.create(file=("big.jsonl", b"x" * (MAX_BYTES + 1)), purpose="batch")
        assert (large.value.status_code, large.value.param) == (413, "file")
        assert len(list((tmp_path / "files").iterdir())) == 2

    run(tmp_path, test)


def test_a_key_sees_its_own_and_an_admin_key_all(tmp_path: Path) -> None:
    async def test(app: FastAPI) -> None:
        one, two, root = (client(app, key) for key in ("one", "two", "root"))
        file = await one.files.create(file=("in.jsonl", LINES), purpose="batch")
        batch = await one.batches.create(
            input_file_id=file.id, endpoint=URL, completion_window="24h", metadata={"night": "first"}
        )
        assert (batch.status, batch.metadata) == ("validating", {"night": "first"})
        for key, found in ((one, [batch.id]), (two, []), (root, [batch.id])):
            assert [each.id async for each in key.batches.list(limit=1)] == found
        calls: list[Callable[[], Awaitable[object]]] = [
            lambda: two.batches.retrieve(batch.id),
            lambda: two.batches.cancel(batch.id),
            lambda: two.files.content(file.id),
            lambda: two.files.delete(file.id),
            lambda: two.batches.create(input_file_id=file.id, endpoint=URL, completion_window="24h"),
        ]
        for call in calls:
            with pytest.raises(openai.NotFoundError):
                await call()
        for _ in range(10_000):
            batch = await root.batches.retrieve(batch.id)
            if batch.status == "completed":
                break
            await asyncio.sleep(0.01)
        assert batch.output_file_id is not None
        lines = [json.loads(line) for line in (await one.files.content(batch.output_file_id)).text.splitlines()]
        bodies = [line["response"]["body"] for line in lines]
        assert [body["prompt"] for body in bodies] == [str(i) for i in range(20)]
        assert {(bool(body["owner"]), body["is_background"]) for body in bodies} == {(True, True)}

    run(tmp_path, test)


@pytest.mark.parametrize(
    ("form", "param"),
    [
        ({"purpose": "assistants"}, "purpose"),
        ({}, "purpose"),
        ({"purpose": "batch", "more": "1"}, "more"),
        ({"purpose": "batch", "expires_after[seconds]": "3600"}, "expires_after[anchor]"),
        ({"purpose": "batch", "expires_after[anchor]": "created_at"}, "expires_after[seconds]"),
        (
            {"purpose": "batch", "expires_after[anchor]": "created_at", "expires_after[seconds]": "9"},
            "expires_after[seconds]",
        ),
        (
            {"purpose": "batch", "expires_after[anchor]": "now", "expires_after[seconds]": "3600"},
            "expires_after[anchor]",
        ),
    ],
)
def test_a_wrong_form_names_the_field(tmp_path: Path, form: dict[str, str], param: str) -> None:
    async def test(app: FastAPI) -> None:
        http = client(app, "one")._client
        headers = {"Authorization": "Bearer one"}
        for data, files, named in (
            (form, {"file": ("a.jsonl", b"{}")}, param),
            ({"purpose": "batch"}, {"file": ("a.jsonl", b"")}, "file"),
            ({"purpose": "batch"}, {"file": (None, b"text")}, "file"),
        ):
            reply = await http.post("http://test/v1/files", data=data, files=files, headers=headers)
            assert (reply.status_code, reply.json()["error"]["param"]) == (400, named)
        assert list((tmp_path / "files").iterdir()) == []

    run(tmp_path, test)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"completion_window": "1y"}, "completion_window"),
        ({"completion_window": "31d"}, "completion_window"),
        ({"completion_window": "0h"}, "completion_window"),
        ({"endpoint": "/v1/messages"}, "endpoint"),
        ({"input_file_id": "file-none"}, "input_file_id"),
        ({"metadata": {"a": 1}}, "metadata.a"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 1}}, "output_expires_after.seconds"),
        ({"prompt": "a"}, "prompt"),
    ],
)
def test_a_wrong_batch_names_the_field(tmp_path: Path, change: dict[str, Any], param: str) -> None:
    async def test(app: FastAPI) -> None:
        body = {"input_file_id": "file-none", "endpoint": URL, "completion_window": "24h"} | change
        headers = {"Authorization": "Bearer one"}
        reply = await client(app, "one")._client.post("http://test/v1/batches", json=body, headers=headers)
        assert reply.status_code == (404 if param == "input_file_id" else 400)
        assert reply.json()["error"]["param"] == param

    run(tmp_path, test)
