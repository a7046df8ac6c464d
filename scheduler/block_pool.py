"""KV blocks: reference counts, sharing, prefix reuse."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence


class OutOfBlocks(Exception):
    """Fewer blocks are free than were asked for; nothing was taken."""


class BlockPool:
    """Owns the KV blocks 0 … num_blocks−1. Each is free or referenced by one or more owners.

    A full block whose content hash is known can be reused after its last owner has released it, until the pool
    allocates it again. Free blocks without a hash are allocated first, then the least recently used ones.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._references = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._hash_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks, each with one reference, and drop their content hashes. Raises OutOfBlocks."""
        if count > len(self._free):
            raise OutOfBlocks
        blocks = []
        for _ in range(count):
            block, _ = self._free.popitem(last=False)
            self._drop_hash(block)
            self._references[block] = 1
            blocks.append(block)
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """Add one reference to each block; a free one is free no more."""
        for block in blocks:
            if self._references[block] == 0:
                del self._free[block]
            self._references[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Remove one reference of each block. The end of a sequence is allocated again before its start."""
        for block in reversed(blocks):
            self._references[block] -= 1
            if self._references[block] < 0:
                raise AssertionError(f"block {block} was released more often than taken")
            if self._references[block] == 0:
                self._free[block] = None
                if block not in self._hash_of:
                    self._free.move_to_end(block, last=False)

    def register(self, block: int, content: bytes) -> None:
        """Make a full block reusable by its content hash. A block registered before with that content stays."""
        if content not in self._block_of and block not in self._hash_of:
            self._block_of[content] = block
            self._hash_of[block] = content

    def match(self, chain: Iterable[bytes]) -> list[int]:
        """The blocks of the longest cached prefix of a chain of content hashes. Adds no reference."""
        found = []
        for content in chain:
            block = self._block_of.get(content)
            if block is None:
                break
            found.append(block)
        return found

    def num_free_among(self, blocks: Iterable[int]) -> int:
        """How many of these blocks are free, so that sharing them leaves fewer free ones."""
        return sum(1 for block in blocks if self._references[block] == 0)

    def check_integrity(self, owners: Iterable[Sequence[int]]) -> None:
        """Raise AssertionError unless the references are exactly those of `owners`."""
        expected = [0] * self.num_blocks
        for blocks in owners:
            for block in blocks:
                expected[block] += 1
        if expected != self._references:
            wrong = [b for b in range(self.num_blocks) if expected[b] != self._references[b]]
            raise AssertionError(f"references of blocks {wrong[:8]} disagree with their owners")
        if {b for b in range(self.num_blocks) if expected[b] == 0} != set(self._free):
            raise AssertionError("the free list disagrees with the reference counts")
        if {h: b for b, h in self._hash_of.items()} != self._block_of:
            raise AssertionError("the two directions of the prefix index disagree")

    def _drop_hash(self, block: int) -> None:
        content = self._hash_of.pop(block, None)
        if content is not None:
            del self._block_of[content]
