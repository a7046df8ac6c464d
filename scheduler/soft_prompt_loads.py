"""Soft prompts that are being loaded, and the sequences that wait for them."""

from __future__ import annotations

from softbatch.scheduler.protocol import SequenceOutput, SoftPromptRef
from softbatch.scheduler.soft_prompt_cache import SoftPromptCache
from softbatch.scheduler.step import Step, StepResult
from softbatch.scheduler.waiting_queue import WaitingQueue


class SoftPromptLoads:
    """Says when a soft prompt is ready or has failed, to the cache that holds it and to the sequences parked on it.

    A load goes from `READING` to `READY`. Between them, one of kind `embeddings` is `PREFILLING`: steps compute its
    keys and values. Whoever loads it calls `start_prefill`, `finish` or `fail`, and `postprocess` after each step.
    """

    def __init__(self, cache: SoftPromptCache, waiting: WaitingQueue, num_blocks: int, block_size: int) -> None:
        self._cache = cache
        self._waiting = waiting
        self._max_prefetch_blocks = num_blocks // 4
        self._block_size = block_size

    def should_prefetch(self, ref: SoftPromptRef, num_reading: int, free_slots: int) -> bool:
        """Whether the next step would load this soft prompt, while `num_reading` others are being read.

        Prefetching may take a quarter of the KV cache. From another thread than the engine's, the answer is a guess.
        """
        blocks = (num_reading + 1) * -(-ref.num_virtual_tokens // self._block_size)
        fits = num_reading < free_slots and blocks <= self._max_prefetch_blocks
        return fits and not len(self._waiting) and self._cache.get(ref.sha256) is None

    def start_prefill(self, sha256: str) -> None:
        """The file of an `embeddings` soft prompt has been read: steps compute its keys and values from now on."""
        prompt = self._cache.get(sha256)
        if prompt is not None:
            self._cache.mark_prefilling(prompt)

    def finish(self, sha256: str) -> None:
        """The keys and values lie in the soft prompt's blocks: sequences parked on it may be admitted."""
        prompt = self._cache.get(sha256)
        if prompt is not None:
            self._cache.mark_ready(prompt)
        parked = self._waiting.unpark(sha256)
        if prompt is not None and prompt.is_retired and not parked:
            self._cache.evict_when_unused(sha256)

    def fail(self, sha256: str, message: str) -> list[SequenceOutput]:
        """The soft prompt cannot be loaded: the sequences parked on it, and only those, fail with `message`."""
        self._cache.drop(sha256)
        failed = self._waiting.unpark(sha256)
        for sequence in failed:
            self._waiting.remove(sequence.request_id)
        return [sequence.failure(message) for sequence in failed]

    def postprocess(self, step: Step, result: StepResult) -> list[SequenceOutput]:
        """Finish the soft prompts whose last chunk a step has computed, and fail those that it could not compute."""
        outputs = []
        for prefill in step.prefills:
            sha256 = prefill.prompt.ref.sha256
            if self._cache.get(sha256) is not prefill.prompt:
                continue  # it has failed in an earlier step
            if sha256 in result.prefill_errors:
                outputs += self.fail(sha256, result.prefill_errors[sha256])
            elif prefill.is_last:
                self.finish(sha256)
        return outputs
