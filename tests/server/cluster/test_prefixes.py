"""Which beginnings of prompts are told apart, and where they were sent."""

from __future__ import annotations

from softbatch.server.cluster.prefixes import (
    LONGEST,
    MOST_HASHES,
    MOST_REPLICAS,
    SHORTEST,
    PrefixTable,
    hashes_in,
    prefix_key,
)


def test_a_conversation_that_grows_keeps_its_beginnings() -> None:
    first = b"".join(b"turn %d; " % number for number in range(100))
    longer, other = first + b"and then" * 900, b"x" + first
    assert prefix_key(first[: SHORTEST - 1]) == ""
    assert hashes_in(prefix_key(first)) == hashes_in(prefix_key(longer))[: len(hashes_in(prefix_key(first)))]
    assert not set(hashes_in(prefix_key(first))) & set(hashes_in(prefix_key(other)))
    assert prefix_key(b"a" * LONGEST) == prefix_key(b"a" * (LONGEST + 1))
    assert hashes_in("manual") == []
    assert len(hashes_in(prefix_key(b"a" * LONGEST))) == MOST_HASHES
    assert hashes_in("#" + "0." * 1000) == [], "no prompt's key is so long"


def test_the_longest_beginning_that_a_replica_has_seen_counts() -> None:
    table = PrefixTable()
    long, short = hashes_in(prefix_key(b"a" * 4096)), hashes_in(prefix_key(b"a" * 300 + b"b" * 700))
    table.sent(long, "one")
    table.sent(short, "two")
    assert table.matches(long) == {"one": len(long), "two": 1}
    assert table.matches(short) == {"one": 1, "two": len(short)}
    assert table.matches(hashes_in(prefix_key(b"c" * 300))) == {}


def test_the_table_is_bounded() -> None:
    table = PrefixTable(most=8)
    for number in range(20):
        table.sent(hashes_in(prefix_key(b"%03d" % number * 100)), f"r{number}")
    assert table.matches(hashes_in(prefix_key(b"000" * 100))) == {}
    for number in range(20):
        table.sent(["same"], f"r{number}")
    assert set(table.matches(["same"])) == {f"r{number}" for number in range(20 - MOST_REPLICAS, 20)}
