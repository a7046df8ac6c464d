"""Several generations read as one: the choices of a request, as their tokens come."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from softbatch.server.requests.generation import Delta, EndOfText, Generation, Token


@dataclass
class Choice:
    """All that one generation has brought."""

    generation: Generation
    pieces: list[str] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    finish_reason: EndOfText | None = None
    stop_reason: str | int | None = None

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    @property
    def as_delta(self) -> Delta:
        """All of it as if it had come at once."""
        return Delta(self.text, tuple(self.tokens), self.finish_reason, self.stop_reason)


async def merge(generations: Sequence[Generation]) -> AsyncGenerator[tuple[int, Delta], None]:
    """(index, delta) of each generation in the order they come; all are cancelled when the reader leaves.

    A generation is not asked for more before the reader is done with what it brought: its counts are those of that.
    The first error of any generation ends them all.
    """
    if len(generations) == 1:
        # No task for each delta where there is nobody to wait for beside it.
        try:
            async with aclosing(aiter(generations[0])) as deltas:
                async for only in deltas:
                    yield 0, only
        finally:
            generations[0].cancel()
        return
    iterators = [aiter(generation) for generation in generations]
    # The default of anext() stands for the end: an exception would be logged as never retrieved.
    pending = {asyncio.ensure_future(anext(it, None)): index for index, it in enumerate(iterators)}
    try:
        while pending:
            done, _ = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in sorted(done, key=pending.__getitem__):
                index = pending.pop(task)
                delta = task.result()
                if delta is not None:
                    yield index, delta
                    pending[asyncio.ensure_future(anext(iterators[index], None))] = index
    finally:
        for generation in generations:
            generation.cancel()
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
        for iterator in iterators:
            await iterator.aclose()


def best_first(choices: Sequence[Choice]) -> list[Choice]:
    """By the log-probability per token, which they need to have."""

    def likely(choice: Choice) -> float:
        logprobs = [token.logprob or 0.0 for token in choice.tokens]
        return math.fsum(logprobs) / max(len(logprobs), 1)

    return sorted(choices, key=likely, reverse=True)


async def gather(generations: Sequence[Generation]) -> list[Choice]:
    """Wait for all of them."""
    choices = [Choice(generation) for generation in generations]
    async with aclosing(merge(generations)) as deltas:
        async for index, delta in deltas:
            choice = choices[index]
            choice.pieces.append(delta.text)
            choice.tokens.extend(delta.tokens)
            choice.finish_reason = delta.finish_reason
            choice.stop_reason = delta.stop_reason
    return choices
