"""The models behind one address: which deployment a name belongs to, and what they list together."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from softbatch.prompt_store.names import is_name
from softbatch.server.cluster.wire import Headers
from softbatch.server.schemas.models import PLACEHOLDERS

# Names that nobody knows are looked for together, and no more often than this: who asks for such names should not ask
# everybody each time.
SECONDS_BETWEEN_LOOKS = 1.0


@dataclass(frozen=True, eq=False)
class ModelTarget:
    """A deployment: `names` are those of its model, and `handle` is Serve's. `headers` carry a key of its own."""

    names: frozenset[str]
    handle: Any
    headers: Headers = field(default_factory=list)


# From a deployment and headers to the cards that its `/v1/models` lists; empty if it gives none.
ListCards = Callable[[ModelTarget, Headers], Awaitable[list[dict[str, Any]]]]


class ModelDirectory:
    """Knows the soft prompts of each deployment by what it lists."""

    def __init__(self, targets: Sequence[ModelTarget], list_cards: ListCards) -> None:
        self.targets = tuple(targets)
        self._list_cards = list_cards
        self._soft_prompts: dict[str, ModelTarget] = {}
        self._looked = -math.inf  # when the last look began
        self._looking: asyncio.Future[None] | None = None

    async def find(self, model: str, soft_prompt: str) -> tuple[ModelTarget, str]:
        """The deployment that is to answer, and the soft prompt's name, if there is one: a name that none may have is
        none. The first deployment gets what belongs to nobody: it says what is wrong."""
        soft_prompt = soft_prompt if is_name(soft_prompt) else ""
        for target in self.targets:
            if model in target.names:
                return target, soft_prompt
        name = soft_prompt or (model if model not in PLACEHOLDERS and is_name(model) else "")
        if len(self.targets) == 1 or not name:
            return self.targets[0], name
        arrived = time.monotonic()
        # Until a look that has begun since: the name may have been registered just now.
        while name not in self._soft_prompts and self._looked <= arrived:
            if self._looking is None or self._looking.done():
                self._looking = asyncio.ensure_future(self._look())
            await asyncio.shield(self._looking)
        found = self._soft_prompts.get(name)
        return (self.targets[0], "") if found is None else (found, name)

    def forget(self, soft_prompt: str) -> None:
        """Who was asked for it does not have it any more: it may be another one's by now."""
        self._soft_prompts.pop(soft_prompt, None)

    async def cards(self, headers: Headers) -> list[dict[str, Any]]:
        """Of all deployments, in their order; a name that several have is listed once."""
        found: dict[str, dict[str, Any]] = {}
        for target in self.targets:
            for card in await self._list_cards(target, headers):
                found.setdefault(card["id"], card)
        return list(found.values())

    async def _look(self) -> None:
        await asyncio.sleep(max(0.0, self._looked + SECONDS_BETWEEN_LOOKS - time.monotonic()))
        self._looked = time.monotonic()
        known: dict[str, ModelTarget] = {}
        for target in self.targets:
            for card in await self._list_cards(target, target.headers):
                known.setdefault(card["id"], target)
        self._soft_prompts = known


def cards_in(body: bytes) -> list[dict[str, Any]]:
    """Of a reply of `/v1/models`."""
    try:
        listed = msgspec.json.decode(body)["data"]
        return [card for card in listed if isinstance(card, dict) and isinstance(card.get("id"), str)]
    except (msgspec.MsgspecError, KeyError, TypeError):
        return []
