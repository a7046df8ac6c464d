"""A request on replicas that die: what the client gets, with scripted replicas and no Ray."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import pytest

from softbatch.scheduler.protocol import SequenceOutput
from softbatch.server.cluster import forwarding
from softbatch.server.cluster.forwarding import Forwarding
from softbatch.server.cluster.wire import Asked, ReplyHead, ReplyPart, Said, decode_said, encode_said, unpack_entry
from softbatch.server.journal import Entry, SequenceBrought, SequenceOpened

STREAM = ReplyHead(200, [(b"content-type", b"text/event-stream"), (b"x-request-id", b"1")])
PLAIN = ReplyHead(200, [(b"content-type", b"application/json")])
END = ReplyPart(b"", more=False)
OPENED = SequenceOpened(0, "abc", 7, 1000)


class Died(Exception):
    pass


def event(text: str) -> ReplyPart:
    return ReplyPart(f"data: {text}\n\n".encode(), more=True)


def brought(*token_ids: int) -> SequenceBrought:
    return SequenceBrought(0, [SequenceOutput("abc", 1, list(token_ids))])


class Replicas:
    """Each says its own script and dies behind it, the last one does not; keeps what each was told of the journal."""

    def __init__(self, *scripts: Sequence[Any]) -> None:
        self.scripts = list(scripts)
        self.told: list[list[Entry] | None] = []

    async def ask(self, entries: list[bytes] | None) -> AsyncGenerator[list[Said], None]:
        self.told.append(None if entries is None else [unpack_entry(entry) for entry in entries])
        for said in self.scripts.pop(0):
            yield decode_said(encode_said([said]))
        if self.scripts:
            raise Died


class Refusing(Replicas):
    """None of them dies."""

    async def ask(self, entries: list[bytes] | None) -> AsyncGenerator[list[Said], None]:
        for said in self.scripts.pop(0):
            yield decode_said(encode_said([said]))


def forward(
    replicas: Replicas, path: str = "/v1/completions", *, repeatable: bool = True
) -> tuple[int | None, list[bytes]]:
    """The status and the parts that the client got."""
    asked = Asked(method="POST", path=path, raw_path=path.encode(), query_string=b"", headers=[], entries=[])
    status: int | None = None
    parts: list[bytes] = []

    async def send(message: Any) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            assert status is None
            status = message["status"]
            assert b"x-request-id" not in dict(message["headers"])
        elif message["body"]:
            parts.append(message["body"])

    asyncio.run(Forwarding(asked, send, (Died,), repeatable=repeatable).run(replicas.ask))
    return status, parts


def test_a_stream_goes_on_without_what_the_client_has() -> None:
    first = [OPENED, STREAM, brought(1), event("a"), brought(2), event("a")]
    second = [STREAM, event("a"), event("a"), brought(3), event("a"), event("b"), END]
    replicas = Replicas(first, second)
    assert forward(replicas) == (200, [b"data: a\n\n"] * 3 + [b"data: b\n\n"])
    assert replicas.told == [[], [OPENED, brought(1), brought(2)]]


def test_choices_may_come_again_in_another_order() -> None:
    first = [STREAM, event("0: x"), event("1: y"), event("1: z")]
    second = [STREAM, event("1: y"), event("1: z"), event("1: w"), event("0: x"), event("0: v"), END]
    _, parts = forward(Replicas(first, second))
    assert parts == [f"data: {text}\n\n".encode() for text in ("0: x", "1: y", "1: z", "1: w", "0: v")]


def test_a_second_death_loses_nothing_either_and_a_third_ends_it() -> None:
    scripts = [
        [STREAM, event("a")],
        [STREAM, event("a"), event("b")],
        [STREAM, event("a"), event("b"), event("c"), END],
    ]
    _, parts = forward(Replicas(*scripts))
    assert parts == [b"data: a\n\n", b"data: b\n\n", b"data: c\n\n"]
    status, parts = forward(Replicas(*[[STREAM, event("a")]] * 4))
    assert status == 200
    assert parts[0] == b"data: a\n\n"
    assert json.loads(parts[1].removeprefix(b"data: "))["error"]["code"] == "replicas_lost"


def test_plain_replies_are_asked_for_again() -> None:
    assert forward(Replicas([], [PLAIN], [PLAIN, ReplyPart(b"{}", more=False)])) == (200, [b"{}"])


def test_bytes_that_were_sent_are_not_sent_again() -> None:
    first = [PLAIN, ReplyPart(b"abc", more=True)]
    second = [PLAIN, ReplyPart(b"ab", more=True), ReplyPart(b"cdef", more=True), END]
    assert forward(Replicas(first, second)) == (200, [b"abc", b"def"])


@pytest.mark.parametrize("name", [b"Content-Length", b"etag"])
def test_two_contents_are_not_made_one(name: bytes) -> None:
    """A file, say, that was another one when it was asked for again."""
    one, two = (ReplyHead(200, [*PLAIN.headers, (name, value)]) for value in (b"3", b"4"))
    first = [one, ReplyPart(b"ab", more=True)]
    with pytest.raises(RuntimeError, match="another content"):
        forward(Replicas(first, [two, ReplyPart(b"abcd", more=False)]))
    assert forward(Replicas(first, [one, ReplyPart(b"abc", more=False)])) == (200, [b"ab", b"c"])


def test_what_changes_something_is_asked_once() -> None:
    replicas = Replicas([], [PLAIN, END])
    status, parts = forward(replicas, "/v1/soft_prompts", repeatable=False)
    assert (status, len(replicas.told)) == (503, 1)
    assert json.loads(parts[0])["error"]["code"] == "replica_lost"


def test_a_full_replica_takes_in_what_had_been_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forwarding, "SECONDS_TO_ASK_AGAIN", 0.0)
    full = [ReplyHead(429, [(b"Retry-After", b"1")]), ReplyPart(b"full", more=False)]
    replicas = Replicas([STREAM, event("a")], full, full, [STREAM, event("a"), event("b"), END])
    assert forward(replicas) == (200, [b"data: a\n\n", b"data: b\n\n"])
    # Whoever comes first hears it at once.
    assert forward(Replicas(full)) == (429, [b"full"])


def test_a_death_behind_the_whole_answer_changes_nothing() -> None:
    replicas = Replicas([PLAIN, ReplyPart(b"{}", more=False)], [])
    assert forward(replicas) == (200, [b"{}"])
    assert len(replicas.told) == 1


def test_another_answer_in_the_midst_of_a_stream_is_told() -> None:
    status, parts = forward(Replicas([STREAM, event("a")], [ReplyHead(404, []), END]))
    assert status == 200
    assert "404" in json.loads(parts[1].removeprefix(b"data: "))["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/batches", "/v1/files/file-1", "/v1/compressions"])
def test_the_replica_that_has_it_is_looked_for(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forwarding, "SECONDS_TO_ASK_OTHERS", 0.0)
    code = "compressions_elsewhere" if "compressions" in path else "batches_elsewhere"
    body = json.dumps({"error": {"code": code}}).encode()
    refusal = [ReplyHead(503, []), ReplyPart(body, more=False)]
    assert forward(Refusing(refusal, refusal, [PLAIN, ReplyPart(b"{}", more=False)]), path) == (200, [b"{}"])
    # Whatever else it says is passed on, and so is that nobody has it.
    other = [ReplyHead(503, []), ReplyPart(b"full", more=True), END]
    assert forward(Refusing(refusal, other), path) == (503, [b"full"])
    assert forward(Refusing(*[refusal] * 100), path) == (503, [body])


def test_a_refusal_that_stays_one_is_not_waited_for() -> None:
    """A soft prompt that is another one by now."""
    changed = [ReplyHead(503, []), ReplyPart(b"changed", more=False)]
    _, parts = forward(Replicas([STREAM, event("a")], changed))
    assert json.loads(parts[1].removeprefix(b"data: "))["error"]["code"] == "replica_lost"
    assert forward(Replicas([OPENED], changed)) == (503, [b"changed"])
