"""A process that is killed before one of its calls to a bucket."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from softbatch.prompt_store.stores.bucket import Bucket

_LOOKS = ("read", "look at", "list")


class Killed(BaseException):
    """As if the process were gone from here on."""


@dataclass
class Fate:
    is_killed: bool = False


@contextlib.contextmanager
def killed_before_call(number: int, *, writes_only: bool = False) -> Iterator[Fate]:
    """The block ends, without an error, before its call of that number, counted from 0 from here. Between two writes
    the bucket stays the same, so `writes_only` need not count the others."""
    ask, fate, left = Bucket._ask, Fate(), iter(range(number))

    def until_killed(self: Bucket, what: str, *arguments: Any) -> Any:
        if not (writes_only and what in _LOOKS) and next(left, None) is None:
            fate.is_killed = True
            raise Killed
        return ask(self, what, *arguments)

    with contextlib.suppress(Killed), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Bucket, "_ask", until_killed)
        yield fate
