"""A request that the end of the server cancels is answered in the shape of every other error."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from softbatch.server.http.cut_off import CutOffMiddleware


def sent_by_cancelled_app(*, begun: bool) -> list[dict[str, Any]]:
    sent: list[dict[str, Any]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if begun:
            await send({"type": "http.response.start", "status": 200, "headers": []})
        await asyncio.Event().wait()

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start" and sent:
            raise RuntimeError("Unexpected ASGI message 'http.response.start' sent")  # as uvicorn does
        sent.append(message)

    async def receive() -> Any:
        return {"type": "http.request"}

    async def run() -> None:
        scope = {"type": "http", "method": "POST", "path": "/v1/soft_prompts", "headers": []}
        task = asyncio.create_task(CutOffMiddleware(app)(scope, receive, send))
        await asyncio.sleep(0)
        task.cancel()
        await task  # nothing is raised, for uvicorn would log it with a traceback

    asyncio.run(run())
    return sent


def test_a_request_without_an_answer_gets_503() -> None:
    start, body = sent_by_cancelled_app(begun=False)
    assert start["status"] == 503
    assert json.loads(body["body"])["error"]["code"] == "draining"


def test_an_answer_that_has_begun_stays_as_it_is() -> None:
    assert [message["type"] for message in sent_by_cancelled_app(begun=True)] == ["http.response.start"]
