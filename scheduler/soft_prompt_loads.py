"""Soft prompts that are being loaded, and the sequences that wait for them."""

from __future__ import annotations

from softbatch.scheduler.protocol import SequenceOutput, SoftPromptRef
from softbatch.scheduler.soft_prompt_cache import ResidentSoftPrompt, SoftPromptCache
from softbatch.scheduler.step import Step, StepResult
from softbatch.scheduler.waiting_queue import WaitingQueue


class SoftPromptLoads:
    """Decides which soft prompts load, and tells the cache and the parked sequences how each load ends.

    A load goes from `READING` to `READY`. In between, a soft prompt of kind `embeddings` is `PREFILLING`: steps compute
    its keys and values. The engine reports progress by `start_prefill`, `finish` and `fail`.
    """

    def __init__(
        self, cache: SoftPromptCache, waiting: WaitingQueue, max_batch_size: int, max_prefetch_blocks: int
    ) -> None:
        self._cache = cache
        self._waiting = waiting
        self._max_batch_size = max_batch_size
        self._max_prefetch_blocks = max_prefetch_blocks

    def find(self, ref: SoftPromptRef, step: Step, num_running: int) -> ResidentSoftPrompt | None:
        """The soft prompt, ready or loading, asking `step` to load it if need be; None if it cannot load now.

        No more soft prompts load at once than slots are free, so that none loads long before its turn.
        """
        prompt = self._cache.get(ref.sha256)
        if prompt is None and self._cache.num_loading < self._max_batch_size - num_running:
            prompt = self._cache.reserve(ref, spare=num_running)
            if prompt is not None:
                step.soft_prompts_to_load.append(ref)
        return prompt

    def should_prefetch(self, ref: SoftPromptRef, num_reading: int, num_running: int) -> bool:
        """Whether the next step would load this soft prompt, while `num_reading` others are being read.

        From another thread than the engine's, the answer is a guess.
        """
        has_slot = num_reading < self._max_batch_size - num_running
        has_blocks = (num_reading + 1) * self._cache.blocks_for(ref) <= self._max_prefetch_blocks
        return has_slot and has_blocks and not len(self._waiting) and self._cache.get(ref.sha256) is None

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
