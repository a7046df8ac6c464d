"""Several models behind one address: whose a name is, and what is listed."""

from __future__ import annotations

import asyncio
from typing import Any

from softbatch.server.cluster.model_directory import ModelDirectory, ModelTarget, cards_in
from softbatch.server.cluster.wire import Headers

SMALL, LARGE = ModelTarget(frozenset({"small"}), "small"), ModelTarget(frozenset({"large", "/models/large"}), "large")


class Listing:
    """What each deployment lists, and how often it was asked."""

    def __init__(self) -> None:
        self.names = {"small": ["small", "manual"], "large": ["large", "policy", "manual"]}
        self.asked = 0

    async def cards(self, target: ModelTarget, _: Headers) -> list[dict[str, Any]]:
        self.asked += 1
        return [{"id": name} for name in self.names[target.handle]]


def test_a_name_belongs_to_who_lists_it() -> None:
    async def check() -> None:
        listing = Listing()
        directory = ModelDirectory([SMALL, LARGE], listing.cards)
        assert await directory.find("/models/large", "manual") == (LARGE, "manual")
        assert await directory.find("tgi", "") == await directory.find("", "") == (SMALL, "")
        assert not listing.asked
        assert await directory.find("policy", "") == (LARGE, "policy")
        assert await directory.find("", "policy") == (LARGE, "policy")
        # Both have it: the first one's.
        assert await directory.find("manual", "") == (SMALL, "manual")
        # What nobody has is not looked for again at once.
        for _ in range(3):
            assert await directory.find("nothing", "") == (SMALL, "nothing")
        assert listing.asked == 2
        assert [card["id"] for card in await directory.cards([])] == ["small", "manual", "large", "policy"]

    asyncio.run(check())


def test_one_model_is_not_looked_up() -> None:
    async def check() -> None:
        listing = Listing()
        directory = ModelDirectory([LARGE], listing.cards)
        assert await directory.find("anything", "") == (LARGE, "anything")
        assert await directory.find("large", "") == (LARGE, "")
        assert not listing.asked

    asyncio.run(check())


def test_a_list_that_cannot_be_read_is_empty() -> None:
    assert cards_in(b'{"data": [{"id": "a"}, {"id": 3}, 4]}') == [{"id": "a"}]
    for body in (b"", b"{}", b"[]", b'{"data": 3}', b'{"error": {}}', b'{"data": null}'):
        assert cards_in(body) == []
