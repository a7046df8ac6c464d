"""Several models behind one address: whose a name is, and what is listed."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from softbatch.server.cluster import model_directory
from softbatch.server.cluster.model_directory import ModelDirectory, ModelTarget, cards_in
from softbatch.server.cluster.wire import Headers

SMALL, LARGE = ModelTarget(frozenset({"small"}), "small"), ModelTarget(frozenset({"large", "/models/large"}), "large")


class Listing:
    """What each deployment lists, and how often it was asked."""

    def __init__(self) -> None:
        self.names = {"small": ["small", "manual"], "large": ["large", "policy", "manual"]}
        self.count = 0
        self.is_asked = asyncio.Event()

    async def cards(self, target: ModelTarget, _: Headers) -> list[dict[str, Any]]:
        self.count += 1
        self.is_asked.set()
        await asyncio.sleep(0)
        return [{"id": name} for name in self.names[target.handle]]


@pytest.fixture(autouse=True)
def _hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_directory, "SECONDS_BETWEEN_LOOKS", 0.01)


def test_a_name_belongs_to_who_lists_it() -> None:
    async def check() -> None:
        listing = Listing()
        directory = ModelDirectory([SMALL, LARGE], listing.cards)
        assert await directory.find("/models/large", "manual") == (LARGE, "manual")
        assert await directory.find("tgi", "") == await directory.find("", "") == (SMALL, "")
        assert listing.count == 0
        assert await directory.find("policy", "") == (LARGE, "policy")
        assert await directory.find("", "policy") == (LARGE, "policy")
        # Both have it: the first one's.
        assert await directory.find("manual", "") == (SMALL, "manual")
        assert listing.count == 2
        # What nobody has is looked for again, once for all who ask.
        asked = [directory.find("nothing", "") for _ in range(3)]
        assert await asyncio.gather(*asked) == [(SMALL, "")] * 3
        assert listing.count == 4
        assert [card["id"] for card in await directory.cards([])] == ["small", "manual", "large", "policy"]

    asyncio.run(check())


def test_a_name_is_found_while_others_look_and_after_it_was_registered() -> None:
    async def check() -> None:
        listing = Listing()
        directory = ModelDirectory([SMALL, LARGE], listing.cards)
        # Several at once, before anything is known.
        asked = [directory.find("policy", ""), directory.find("manual", ""), directory.find("policy", "")]
        assert await asyncio.gather(*asked) == [(LARGE, "policy"), (SMALL, "manual"), (LARGE, "policy")]
        # Registered during somebody's look for another name, or right behind it.
        listing.is_asked.clear()
        looking = asyncio.ensure_future(directory.find("nothing", ""))
        await listing.is_asked.wait()
        listing.names["small"] = [*listing.names["small"], "early"]
        listing.names["large"] = [*listing.names["large"], "new"]
        assert await directory.find("early", "") == (SMALL, "early")
        assert await looking == (SMALL, "")
        listing.names["large"] = [*listing.names["large"], "newest"]
        assert await directory.find("newest", "") == (LARGE, "newest")

    asyncio.run(check())


def test_a_name_that_has_moved_is_found_again() -> None:
    async def check() -> None:
        listing = Listing()
        directory = ModelDirectory([SMALL, LARGE], listing.cards)
        assert await directory.find("policy", "") == (LARGE, "policy")
        listing.names = {"small": ["small", "policy"], "large": ["large"]}
        assert await directory.find("policy", "") == (LARGE, "policy")
        directory.forget("policy")  # it answered 404
        assert await directory.find("policy", "") == (SMALL, "policy")

    asyncio.run(check())


def test_one_model_is_not_looked_up() -> None:
    async def check() -> None:
        listing = Listing()
        directory = ModelDirectory([LARGE], listing.cards)
        assert await directory.find("anything", "") == (LARGE, "anything")
        assert await directory.find("large", "") == (LARGE, "")
        assert listing.count == 0

    asyncio.run(check())


@pytest.mark.parametrize("text", ["#0.1.2.3", "#" + "0." * 100_000, "m" * 200_000, "/v1/batches", "a b", "é"])
def test_what_no_soft_prompt_may_be_called_is_no_name(text: str) -> None:
    """It is neither looked up nor given to the router, which would take it for what it is not."""

    async def check() -> None:
        listing = Listing()
        for targets in ([LARGE], [LARGE, SMALL]):
            directory = ModelDirectory(targets, listing.cards)
            for model, soft_prompt in ((text, ""), ("", text), ("large", text), (text, text)):
                assert await directory.find(model, soft_prompt) == (LARGE, "")
        assert listing.count == 0

    asyncio.run(check())


def test_a_list_that_cannot_be_read_is_empty() -> None:
    assert cards_in(b'{"data": [{"id": "a"}, {"id": 3}, 4]}') == [{"id": "a"}]
    for body in (b"", b"{}", b"[]", b'{"data": 3}', b'{"error": {}}', b'{"data": null}'):
        assert cards_in(body) == []
