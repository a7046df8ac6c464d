"""The KV blocks of a sequence: shared with its soft prompt, reused from other sequences, or newly allocated."""

from __future__ import annotations

from softbatch.scheduler.block_pool import BlockPool
from softbatch.scheduler.sequence import Sequence
from softbatch.scheduler.soft_prompt_cache import ResidentSoftPrompt, SoftPromptCache


class SequenceBlocks:
    """Owns the changes to block tables, to pins on soft prompts, and to what other sequences may reuse."""

    def __init__(self, pool: BlockPool, soft_prompts: SoftPromptCache, *, reuses_output: bool = True) -> None:
        self.pool, self.soft_prompts = pool, soft_prompts
        self._reuses_output = reuses_output

    def most(self, sequence: Sequence) -> int:
        """The number of blocks that the sequence needs to run alone, the soft prompt's partly filled one included."""
        size = self.pool.block_size
        return -(-sequence.max_length // size) + (1 if sequence.num_virtual % size else 0)

    def take(self, sequence: Sequence, prompt: ResidentSoftPrompt | None, spare: int) -> bool:
        """Give the sequence blocks for its known tokens and set `num_computed`; False if fewer than `spare` would stay
        free."""
        size = self.pool.block_size
        virtual_blocks = sequence.num_virtual // size
        reused = self._reusable(sequence)
        new = -(-sequence.length // size) - virtual_blocks - len(reused)
        needed = new + self.pool.num_free_among(reused) + spare
        if not self.soft_prompts.make_room(needed, keep=prompt.ref.sha256 if prompt else None):
            return False
        if prompt is not None:
            self.soft_prompts.acquire(prompt)
            sequence.block_table = self.soft_prompts.shared_blocks(prompt)
        self.pool.share(reused)
        sequence.num_registered = len(reused)
        sequence.block_table = [*sequence.block_table, *reused, *self.pool.allocate(new)]
        sequence.num_computed = max(sequence.num_virtual, (virtual_blocks + len(reused)) * size)
        return True

    def num_to_compute(self, sequence: Sequence) -> int:
        """The tokens that a sequence still has to compute: one that waits, if it got its blocks now."""
        if sequence.block_table:
            return sequence.length - sequence.num_computed
        size = self.pool.block_size
        found = (sequence.num_virtual // size + len(self._reusable(sequence))) * size
        return sequence.length - max(sequence.num_virtual, found)

    def _reusable(self, sequence: Sequence) -> list[int]:
        """The blocks of others that begin as the sequence does, behind its soft prompt's own full ones."""
        size = self.pool.block_size
        known = sequence.num_reusable
        if not self._reuses_output:  # of a resumed sequence's output neither: others computed it as a prompt
            known = min(known, sequence.num_prompt + 1)
        reusable = (sequence.num_virtual + known - 1) // size - sequence.num_virtual // size
        return self.pool.match(sequence.hash_blocks(max(0, reusable), size))

    def copy_of_last(self, sequence: Sequence, prompt: ResidentSoftPrompt) -> tuple[int, int] | None:
        """(from, to) of the soft prompt's partly filled last block. None without one, or if a reused block holds it."""
        if sequence.num_virtual % self.pool.block_size == 0 or sequence.num_computed != sequence.num_virtual:
            return None
        return prompt.blocks[-1], sequence.block_table[sequence.num_virtual // self.pool.block_size]

    def grow(self, sequence: Sequence) -> bool:
        """Add a block if the next token needs one; False if no block is left."""
        if sequence.length <= len(sequence.block_table) * self.pool.block_size:
            return True
        if not self.soft_prompts.make_room(1):
            return False
        sequence.block_table += self.pool.allocate(1)
        return True

    def register(self, sequence: Sequence, end: int) -> None:
        """Make the blocks that are full, up to position `end`, reusable by later sequences."""
        size = self.pool.block_size
        first = sequence.num_virtual // size
        full = end // size - first
        if full > sequence.num_registered:
            hashes = sequence.hash_blocks(full, size)
            for index in range(sequence.num_registered, full):
                self.pool.register(sequence.block_table[first + index], hashes[index])
            sequence.num_registered = full

    def give_back(self, sequence: Sequence) -> None:
        self.pool.release(sequence.block_table)
        sequence.block_table = []
        if sequence.soft_prompt is not None:
            self.soft_prompts.release(sequence.soft_prompt.sha256)
