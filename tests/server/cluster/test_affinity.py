"""Where a request goes, and what the ingress reads in it."""

from __future__ import annotations

from collections import Counter

from softbatch.server.cluster.affinity import PREFIX_BOUND, SOFT_PROMPT_BOUND, ReplicaLoad, ranked
from softbatch.server.cluster.request_kinds import (
    BATCHES,
    COMPRESSIONS,
    Named,
    is_generating,
    may_be_asked_twice,
    names_in,
    place_of,
)

KEYS = [f"replica-{at}" for at in range(8)]


def idle(**changes: ReplicaLoad) -> list[ReplicaLoad]:
    return [changes.get(key.replace("-", "_"), ReplicaLoad(key, 0)) for key in KEYS]


def test_who_holds_it_comes_first_then_who_has_room() -> None:
    candidates = [
        ReplicaLoad("full", 0, has_room=False),
        ReplicaLoad("roomy", 3),
        ReplicaLoad("holder", 5, match=1, has_room=False),
    ]
    assert ranked("manual", candidates, SOFT_PROMPT_BOUND) == [["holder"], ["roomy"], ["full"]]


def test_a_name_has_one_order_and_names_are_spread() -> None:
    orders = {f"prompt-{at}": ranked(f"prompt-{at}", idle(), SOFT_PROMPT_BOUND) for at in range(400)}
    assert all(sorted(key for group in order for key in group) == KEYS for order in orders.values())
    assert orders == {name: ranked(name, list(reversed(idle())), SOFT_PROMPT_BOUND) for name in orders}
    assert min(Counter(order[0][0] for order in orders.values()).values()) > 20


def test_a_busy_holder_is_passed_over_but_not_for_a_busier_one() -> None:
    most = SOFT_PROMPT_BOUND.requests
    busy = ReplicaLoad("holder", most + 1, match=1)
    assert ranked("manual", [busy, ReplicaLoad("other", 0)], SOFT_PROMPT_BOUND) == [["other"], ["holder"]]
    # Where all have as much to do, nobody has too much.
    assert ranked("manual", [busy, ReplicaLoad("other", most + 1)], SOFT_PROMPT_BOUND)[0] == ["holder"]
    both = [ReplicaLoad("one", 1, match=1), ReplicaLoad("two", 2, match=1), ReplicaLoad("three", 0)]
    first, second = ranked("manual", both, SOFT_PROMPT_BOUND)
    assert (sorted(first), second) == (["one", "two"], ["three"])


def test_what_one_replica_alone_can_serve_goes_there_however_busy_it_is() -> None:
    busy = ReplicaLoad("holder", 10 * SOFT_PROMPT_BOUND.requests, match=1)
    assert ranked(BATCHES, [ReplicaLoad("other", 0), busy], None) == [["holder"], ["other"]]


def test_who_holds_more_comes_first_and_a_prefix_is_worth_less_waiting() -> None:
    candidates = [ReplicaLoad("some", 0, match=1), ReplicaLoad("all", 3, match=4), ReplicaLoad("none", 0)]
    assert ranked("prefix", candidates, PREFIX_BOUND) == [["all"], ["some"], ["none"]]
    busy = [ReplicaLoad("all", PREFIX_BOUND.requests + 1, match=4), ReplicaLoad("none", 0)]
    assert ranked("prefix", busy, PREFIX_BOUND) == [["none"], ["all"]]
    assert ranked("manual", busy, SOFT_PROMPT_BOUND) == [["all"], ["none"]]


def test_what_a_request_is_about() -> None:
    assert names_in(b'{"model": "a", "soft_prompt": "b"}') == Named("a", "b")
    start = names_in(b'{"messages": [1], "temperature": 1, "system": "s", "tools": [{}]}').start
    assert start == b'[{}]"s"[1]', "in the order of templates"
    assert names_in(b'{"adapter_id": "b", "model": 3}') == Named("", "b")
    for body in (b"", b"{", b"[]", b'{"model": null}', b"\xff", b"[" * 2000):
        assert names_in(body) == Named()
    assert place_of("/v1/files/file-1/content") == BATCHES
    assert place_of("/v1/batches") == BATCHES
    assert place_of("/v1/compressions/x/cancel") == COMPRESSIONS
    assert place_of("/v1/filesystem") == place_of("/v1/chat/completions") == ""


def test_what_may_be_asked_twice() -> None:
    for path in ("/v1/completions", "/v1/messages", "/generate", "/", "/v1/score", "/tokenize"):
        assert may_be_asked_twice("POST", path)
        assert is_generating("POST", path)
    for path in (
        "/v1/soft_prompts",
        "/v1/soft_prompts/manual",
        "/v1/compressions",
        "/v1/files",
        "/v1/batches/b/cancel",
    ):
        assert may_be_asked_twice("GET", path)
        assert not is_generating("GET", path)
        for method in ("POST", "DELETE"):
            assert not may_be_asked_twice(method, path)
