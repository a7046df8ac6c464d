"""The soft prompts in KV blocks: loaded on demand, shared by the sequences that use them, evicted when unused."""

from __future__ import annotations

import enum
from collections import OrderedDict
from dataclasses import dataclass

from softbatch.scheduler.block_pool import BlockPool
from softbatch.scheduler.protocol import SoftPromptRef


class LoadState(enum.Enum):
    READING = "reading"  # its file is being read in another thread
    PREFILLING = "prefilling"  # its keys and values are being computed, chunk by chunk
    READY = "ready"


@dataclass(eq=False)
class ResidentSoftPrompt:
    """A soft prompt with its own blocks; `users` running sequences share the full ones."""

    ref: SoftPromptRef
    blocks: list[int]
    state: LoadState = LoadState.READING
    users: int = 0
    num_computed: int = 0
    is_retired: bool = False

    @property
    def evictable(self) -> bool:
        return self.state is LoadState.READY and self.users == 0


class SoftPromptCache:
    """Owns one reference to every block of every resident soft prompt.

    A soft prompt is pinned while it loads and while a running sequence uses it. All others are evicted, least recently
    used first, when blocks are needed. What a step asks for costs the same however many are resident.
    """

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._resident: OrderedDict[str, ResidentSoftPrompt] = OrderedDict()
        self._loading: dict[str, ResidentSoftPrompt] = {}  # those that are not ready, oldest first
        self._ready_blocks = 0
        self.hits = 0
        self.misses = 0
        self.evictions = 0
        self.changes = 0  # how often a soft prompt has become ready, or has gone that was

    def __len__(self) -> int:
        """The number of soft prompts that are ready."""
        return len(self._resident) - len(self._loading)

    @property
    def num_blocks(self) -> int:
        """The blocks of soft prompts that are ready."""
        return self._ready_blocks

    @property
    def num_loading(self) -> int:
        return len(self._loading)

    def get(self, sha256: str) -> ResidentSoftPrompt | None:
        return self._resident.get(sha256)

    def all(self) -> list[ResidentSoftPrompt]:
        return list(self._resident.values())

    def ready(self) -> list[str]:
        """The content hashes of the soft prompts whose keys and values are in the blocks."""
        ready = (prompt for prompt in self._resident.values() if prompt.state is LoadState.READY)
        return list(dict.fromkeys(prompt.ref.content for prompt in ready))

    def blocks_for(self, ref: SoftPromptRef) -> int:
        """The number of blocks that the soft prompt fills, the last one perhaps in part."""
        return -(-ref.num_virtual_tokens // self._pool.block_size)

    def prefilling(self) -> list[ResidentSoftPrompt]:
        """The soft prompts whose keys and values are being computed, oldest first."""
        return [p for p in self._loading.values() if p.state is LoadState.PREFILLING]

    def mark_prefilling(self, prompt: ResidentSoftPrompt) -> None:
        """The file has been read: steps compute the keys and values from now on."""
        prompt.state = LoadState.PREFILLING

    def mark_ready(self, prompt: ResidentSoftPrompt) -> None:
        """The keys and values are in the blocks."""
        if self._loading.pop(prompt.ref.sha256, None) is not None:
            self._ready_blocks += len(prompt.blocks)
            self.changes += 1
        prompt.state = LoadState.READY

    def reserve(self, ref: SoftPromptRef, spare: int) -> ResidentSoftPrompt | None:
        """Allocate blocks for a soft prompt that is to be loaded, evicting others if need be. None if fewer than
        `spare` blocks would stay free."""
        count = self.blocks_for(ref)
        if not self.make_room(count + spare):
            return None
        prompt = ResidentSoftPrompt(ref, self._pool.allocate(count))
        self._resident[ref.sha256] = self._loading[ref.sha256] = prompt
        return prompt

    def acquire(self, prompt: ResidentSoftPrompt) -> None:
        """Pin the soft prompt for one more running sequence, and share the full blocks with it."""
        prompt.users += 1
        self._resident.move_to_end(prompt.ref.sha256)
        self._pool.share(self.shared_blocks(prompt))

    def release(self, sha256: str) -> None:
        """Unpin the soft prompt. The sequence releases its references to the blocks itself."""
        prompt = self._resident[sha256]
        prompt.users -= 1
        if prompt.is_retired and prompt.evictable:
            self.drop(sha256)

    def shared_blocks(self, prompt: ResidentSoftPrompt) -> list[int]:
        """The blocks that virtual tokens fill. A partly filled last one is copied per sequence instead."""
        return prompt.blocks[: prompt.ref.num_virtual_tokens // self._pool.block_size]

    def make_room(self, count: int, *, keep: str | None = None) -> bool:
        """Evict unused soft prompts, except `keep`, until `count` blocks are free. If that is impossible, evict none
        and return False."""
        missing = count - self._pool.num_free
        if missing <= 0:
            return True
        victims = []
        for sha256, prompt in self._resident.items():
            if prompt.evictable and sha256 != keep:
                victims.append(sha256)
                missing -= len(prompt.blocks)
                if missing <= 0:
                    for victim in victims:
                        self.drop(victim)
                        self.evictions += 1
                    return True
        return False

    def evict_when_unused(self, sha256: str) -> None:
        """The soft prompt was deleted from the store: drop it now, or as soon as no sequence uses it."""
        for name, prompt in list(self._resident.items()):
            if sha256 not in (name, prompt.ref.content):
                continue
            if prompt.evictable:
                self.drop(name)
            else:
                prompt.is_retired = True

    def check_integrity(self) -> None:
        """Raise AssertionError if the running counts disagree with the soft prompts."""
        prompts = self._resident.values()
        if list(self._loading.values()) != [p for p in prompts if p.state is not LoadState.READY]:
            raise AssertionError("the loading soft prompts are not those that are not ready")
        if self._ready_blocks != sum(len(p.blocks) for p in prompts if p.state is LoadState.READY):
            raise AssertionError("the blocks of ready soft prompts are miscounted")

    def drop(self, sha256: str) -> None:
        """Release the blocks of a soft prompt that is evicted, deleted or could not be loaded."""
        prompt = self._resident.pop(sha256)
        if self._loading.pop(sha256, None) is None:
            self._ready_blocks -= len(prompt.blocks)
            self.changes += 1
        self._pool.release(prompt.blocks)
