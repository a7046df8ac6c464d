"""How much the bodies of all requests of an ingress may hold."""

from __future__ import annotations

import pytest

from softbatch.server.cluster.body_room import BodyRoom, NoRoom


def test_bodies_have_a_bound_together_and_one_alone_has_none() -> None:
    room = BodyRoom(100)
    with room.held() as other:
        with room.held() as large:
            large.grow(80)
            large.grow(80)
            with pytest.raises(NoRoom) as refused:
                other.grow(1)
        assert (refused.value.status, refused.value.headers) == (503, {"Retry-After": "5"})
        other.grow(60)
        with room.held() as third:
            third.grow(40)
            with pytest.raises(NoRoom):
                third.grow(1)
        with room.held() as third:
            third.grow(40)
