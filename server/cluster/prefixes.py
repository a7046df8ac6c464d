"""How a prompt begins, as a router can tell it: hashes of its beginnings, each twice as long as the one before."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

# Bytes: shorter prompts are computed sooner than found.
SHORTEST, LONGEST = 256, 65_536
# Of replicas that have computed one beginning.
MOST_REPLICAS = 4
# Of one prompt, and the digits of each of its hashes.
MOST_HASHES, _DIGITS = (LONGEST // SHORTEST).bit_length(), 12
MOST_PREFIXES = 100_000
# No soft prompt's name begins so.
_MARK = "#"


def prefix_key(start: bytes) -> str:
    """Of a prompt; empty if it is too short."""
    hashes, hashed, length = [], hashlib.blake2b(digest_size=_DIGITS // 2), 0
    size = SHORTEST
    while size <= min(len(start), LONGEST):
        hashed.update(start[length:size])
        hashes.append(hashed.hexdigest())
        length, size = size, 2 * size
    return _MARK + ".".join(hashes) if hashes else ""


def hashes_in(key: str) -> list[str]:
    """The shortest beginning first; none if the key is no prompt's."""
    is_prompts = key.startswith(_MARK) and len(key) <= MOST_HASHES * (_DIGITS + 1)
    return key.removeprefix(_MARK).split(".") if is_prompts else []


class PrefixTable:
    """Where beginnings were sent, those sent last. Two routers need not agree: a beginning that one has never seen goes
    where its hash says."""

    def __init__(self, most: int = MOST_PREFIXES) -> None:
        self._most = most
        self._replicas: OrderedDict[str, tuple[str, ...]] = OrderedDict()

    def sent(self, hashes: Sequence[str], replica: str) -> None:
        for one in hashes:
            others = (other for other in self._replicas.pop(one, ()) if other != replica)
            self._replicas[one] = (replica, *others)[:MOST_REPLICAS]
        while len(self._replicas) > self._most:
            self._replicas.popitem(last=False)

    def matches(self, hashes: Sequence[str]) -> dict[str, int]:
        """For each replica that has seen one of them, which: 1 for the shortest."""
        return {replica: at for at, one in enumerate(hashes, 1) for replica in self._replicas.get(one, ())}
