"""A request that another server goes on with: the same tokens, seeds, names and times, and no token twice."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from softbatch.scheduler.protocol import AddRequest, SamplingParams, SequenceOutput
from softbatch.server.journal import (
    Entry,
    Journal,
    SequenceBrought,
    SequenceOpened,
    keep_journal,
    open_sequence,
    unique_names,
)
from softbatch.server.request_failures import SequenceChanged
from softbatch.server.requests.active_request import ActiveRequest
from softbatch.server.tools.call_formats import mistral_id
from tests.support.in_process_engine import InProcessEngine

TOKENS = 12


async def begun(seed: int, max_tokens: int = TOKENS) -> ActiveRequest:
    opened = open_sequence(seed, [1, 2, 3])
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, seed=opened.seed)
    add = AddRequest(request_id=opened.request_id, token_ids=[1, 2, 3], params=params)
    return ActiveRequest.of(add, None, "", 0.0, opened=opened)


async def serve(
    engine: InProcessEngine, entries: list[Entry], steps: int, seed: int
) -> tuple[list[Entry], list[list[int]], ActiveRequest]:
    """So many steps on a server that then is gone: its new entries, and the batches that a route got."""
    written: list[Entry] = []
    keep_journal(Journal(written.append, entries))
    request = await begun(seed)
    engine.client.submit(request)
    got: list[list[int]] = []

    async def read() -> None:
        async for outputs in engine.client.outputs(request):
            got.append([token_id for output in outputs for token_id in output.token_ids])

    reading = asyncio.create_task(read())
    for _ in range(steps):
        await asyncio.sleep(0)
        if engine.client.active:
            engine.step()
        for _ in range(3):
            await asyncio.sleep(0)
    reading.cancel()
    return written, got, request


async def whole(seed: int) -> list[int]:
    _, got, _ = await serve(InProcessEngine(), [], TOKENS + 4, seed)
    return [token_id for batch in got for token_id in batch]


def test_another_server_goes_on_and_says_the_same_before() -> None:
    async def check() -> None:
        expected = await whole(5)
        assert len(expected) == TOKENS
        first, got, before = await serve(InProcessEngine(), [], 5, 5)
        assert 0 < sum(map(len, got)) < TOKENS
        engine = InProcessEngine()
        second, again, after = await serve(engine, first, TOKENS + 4, 99)
        assert again[: len(got)] == got
        assert [token_id for batch in again for token_id in batch] == expected
        # Only what was missing was computed, and only that was written down.
        assert engine.metrics.registry.get_sample_value("softbatch_generation_tokens_total") == TOKENS - sum(
            map(len, got)
        )
        assert sum(
            len(output.token_ids) for e in second if not isinstance(e, SequenceOpened) for output in e.outputs
        ) == (TOKENS - sum(map(len, got)))
        assert (after.request_id, after.params.seed, after.created) == (before.request_id, 5, before.created)

        last_at = [entry.at for entry in second if isinstance(entry, SequenceBrought)][-1]
        second = [
            msgspec.structs.replace(entry, at=entry.at - 1000) if isinstance(entry, SequenceBrought) else entry
            for entry in second
        ]
        # Of one that had ended there is nothing to compute, and it ends when it had.
        third = InProcessEngine()
        _, last, said_again = await serve(third, [*first, *second], 1, 7)
        assert [token_id for batch in last for token_id in batch] == expected
        assert not third.computed
        assert said_again.ended_at == last_at - 1000

    asyncio.run(check())


def test_nobody_goes_on_behind_another_prompt_or_soft_prompt() -> None:
    """The name that a request gives may be another soft prompt's by then, and its text other tokens."""

    async def check() -> None:
        written: list[Entry] = []
        keep_journal(Journal(written.append))
        opened = [open_sequence(1, [1, 2], "preview"), open_sequence(1, [1, 2])]
        for token_ids, soft_prompt in (([1, 2], "trained"), ([1, 2], ""), ([1, 3], "preview")):
            keep_journal(Journal(written.append, opened))
            with pytest.raises(SequenceChanged):
                open_sequence(1, token_ids, soft_prompt)
        keep_journal(Journal(written.append, opened))
        assert [open_sequence(2, [1, 2], "preview"), open_sequence(2, [1, 2])] == opened == written

    asyncio.run(check())


def test_names_that_are_drawn_are_the_same_on_every_server() -> None:
    async def drawn(entries: list[Entry]) -> tuple[list[Entry], list[str]]:
        written: list[Entry] = []
        keep_journal(Journal(written.append, entries))
        open_sequence(1, [1])
        first, second = unique_names(), unique_names()
        if entries:  # the choices come in another order
            others = [second(), mistral_id(second())]
            return written, [first(), mistral_id(first()), *others]
        return written, [first(), mistral_id(first()), second(), mistral_id(second())]

    async def check() -> None:
        entries, names = await asyncio.create_task(drawn([]))
        assert len(set(names)) == 4
        assert await asyncio.create_task(drawn(entries)) == ([], names)
        assert (await asyncio.create_task(drawn([])))[1] != names

    asyncio.run(check())


def test_without_a_journal_nothing_is_kept() -> None:
    async def check() -> None:
        request = await begun(3)
        assert request.journal is None
        assert not request.resumed
        draw = unique_names()
        assert len({draw() for _ in range(50)}) == 50
        assert SequenceOutput("a", 1).token_ids == []

    asyncio.run(check())
