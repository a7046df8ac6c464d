"""The app inside of a replica: what it says comes out in order, and it hears when its client goes."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest

from softbatch.server.cluster.inner_call import InnerCall
from softbatch.server.cluster.wire import Asked, ReplyHead, ReplyPart, Said, pack_entry
from softbatch.server.journal import SequenceOpened, open_sequence

ASKED = Asked(method="POST", path="/p", raw_path=b"/p", query_string=b"", headers=[(b"a", b"b")], entries=[])


async def said_by(app: Any, asked: Asked = ASKED) -> list[Said]:
    return [one async for said in InnerCall(app, asked, b"body").run() for one in said]


def test_what_the_journal_says_comes_before_what_is_made_of_it() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert (scope["path"], scope["headers"]) == ("/p", [(b"a", b"b")])
        assert (await receive())["body"] == b"body"
        await send({"type": "http.response.start", "status": 200, "headers": []})
        opened = open_sequence(3, [1])
        await send({"type": "http.response.body", "body": opened.request_id.encode(), "more_body": False})

    head, opened, part = asyncio.run(said_by(app))
    assert head == ReplyHead(200, [])
    assert part == ReplyPart(opened.request_id.encode(), more=False)  # type: ignore[union-attr]
    # Where nobody would go on with it, nothing is kept.
    kept = asyncio.run(
        said_by(app, Asked(method="POST", path="/p", raw_path=b"/p", query_string=b"", headers=ASKED.headers))
    )
    assert [type(one) for one in kept] == [ReplyHead, ReplyPart]


def test_an_app_hears_that_its_client_has_gone_and_waits_for_who_is_slow() -> None:
    heard: list[str] = []
    sent: list[int] = []

    async def app(_scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for number in range(100):
            sent.append(number)
            await send({"type": "http.response.body", "body": b"x" * 400_000, "more_body": True})
        heard.append((await receive())["type"])

    async def leave() -> None:
        running = InnerCall(app, ASKED, b"").run()
        await anext(running)
        await asyncio.sleep(0.05)
        assert len(sent) < 10
        await running.aclose()

    asyncio.run(leave())
    assert heard == ["http.disconnect"]


def test_what_another_model_has_begun_is_refused() -> None:
    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        open_sequence(3, [1])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def first_said(entries: list[Any], model: str) -> list[Said]:
        asked = msgspec.structs.replace(ASKED, entries=[pack_entry(entry) for entry in entries])
        return [one async for said in InnerCall(app, asked, b"", model).run() for one in said]

    opened, head, _ = asyncio.run(first_said([], "one"))
    assert isinstance(opened, SequenceOpened)
    assert asyncio.run(first_said([opened], "one"))[0] == head
    refused = asyncio.run(first_said([opened], "two"))[0]
    assert isinstance(refused, ReplyHead)
    assert refused.status == 503


def test_an_app_that_fails_is_told() -> None:
    async def app(*_: Any) -> None:
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        asyncio.run(said_by(app))
