"""Who runs at each step: `schedule()` before it, `mark_in_flight()` at its launch, `postprocess()` after it."""

from __future__ import annotations

import bisect
from dataclasses import dataclass

from softbatch.scheduler.block_pool import BlockPool
from softbatch.scheduler.protocol import AddRequest, EngineStats, SequenceOutput, SoftPromptRef
from softbatch.scheduler.sequence import Sequence
from softbatch.scheduler.sequence_blocks import SequenceBlocks
from softbatch.scheduler.soft_prompt_cache import LoadState, ResidentSoftPrompt, SoftPromptCache
from softbatch.scheduler.step import SoftPromptPrefill, Step, StepResult, StepRow
from softbatch.scheduler.waiting_queue import WaitingQueue, WaitingQueueFull


@dataclass(frozen=True)
class SchedulerConfig:
    max_batch_size: int
    max_batch_tokens: int
    max_model_len: int
    max_queue_size: int
    num_blocks: int
    block_size: int
    eos_token_ids: frozenset[int]


class Scheduler:
    """Owns the waiting queue, the running batch, the pool of blocks and the resident soft prompts.

    Invariants, checked by `check_integrity`: at most `max_batch_size` sequences run; the reference count of every block
    is the number of its owners; a running sequence has blocks for every position it has computed. Every step schedules
    decodes first, so that a long prefill never stalls them.

    With async scheduling, step N+1 is scheduled while step N is in flight, assuming that no sequence finishes in N.
    Rows of sequences that did finish are discarded. They may still write to freed blocks; that is safe because steps
    run in order on the device and the new owner writes later.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.pool = BlockPool(config.num_blocks, config.block_size)
        self.soft_prompts = SoftPromptCache(self.pool)
        self._blocks = SequenceBlocks(self.pool, self.soft_prompts)
        self.waiting = WaitingQueue(config.max_queue_size)
        self.running: list[Sequence] = []  # by order: the last is the first to be preempted
        self._arrivals = 0
        self._preemptions = 0
        self._out_of_memory = 0
        self._admission_limit = (
            config.max_batch_size
        )  # lower after running out of device memory, until a sequence leaves
        self._prefix_queries = 0
        self._prefix_hits = 0

    @property
    def has_work(self) -> bool:
        return bool(self.running or len(self.waiting) or self.soft_prompts.prefilling())

    def add(self, request: AddRequest) -> SequenceOutput | None:
        """Queue a sequence; returns its refusal if it can never fit or the queue is full."""
        sequence = Sequence(request, self._arrivals)
        self._arrivals += 1
        if sequence.max_length > self.config.max_model_len:
            return _failed(sequence, f"prompt and max_tokens together exceed {self.config.max_model_len} tokens")
        if self._blocks.most(sequence) > self.config.num_blocks:
            return _failed(sequence, "the KV cache is too small for this request")
        try:
            self.waiting.push(sequence)
        except WaitingQueueFull:
            return _failed(sequence, "the waiting queue is full")
        return None

    def cancel(self, request_id: str) -> bool:
        """Remove a sequence at once; False if it is unknown or has already left."""
        if self.waiting.remove(request_id):
            return True
        for sequence in self.running:
            if sequence.request_id == request_id:
                self._leave(sequence)
                return True
        return False

    def shrink(self, step: Step) -> bool:
        """Make smaller a step for which the device ran out of memory; False if it cannot be made smaller.

        First, prefills of soft prompts are postponed. Then the newest sequence is preempted. A row that is alone is
        halved. Admission stays paused until a sequence leaves.
        """
        self._out_of_memory += 1
        if step.prefills and len(step.prefills) + len(step.rows) > 1:
            step.prefills.pop()
            return True
        if len(step.rows) > 1:
            sequence = max((row.sequence for row in step.rows), key=lambda s: s.order)
            step.rows = [row for row in step.rows if row.sequence is not sequence]
            step.copies = [copy for copy in step.copies if copy[1] not in sequence.block_table]
            step.admitted = [name for name in step.admitted if name != sequence.request_id]
            self._preempt(sequence, step)
            self._admission_limit = len(self.running)
            return True
        step.rows = [row._replace(num_tokens=row.num_tokens // 2) for row in step.rows if row.num_tokens > 1]
        step.prefills = [
            prefill._replace(num_tokens=prefill.num_tokens // 2) for prefill in step.prefills if prefill.num_tokens > 1
        ]
        return bool(step)

    def pause_admission(self) -> None:
        """Admit no sequence until one leaves: the device had no memory for an allocation outside a step."""
        self._out_of_memory += 1
        self._admission_limit = len(self.running)

    def schedule(self) -> Step:
        step = Step()
        budget = self._continue_decodes(step)
        prefilling = [s for s in self.running if s.length - s.num_computed > 1]
        budget -= self._prefill_soft_prompts(step, budget, others=bool(prefilling))
        for sequence in prefilling:
            if budget > 0:
                budget -= self._add_row(step, sequence, budget)
        self._admit(step, budget)
        return step

    def admit_late(self, step: Step) -> None:
        """Add soft prompts that were read after `schedule()`, and sequences that waited for them, if the token budget
        allows."""
        budget = self.config.max_batch_tokens - step.num_tokens
        self._admit(step, budget - self._prefill_soft_prompts(step, budget, others=False))

    def mark_in_flight(self, step: Step) -> None:
        """Count the step's positions as computed and the tokens it will sample as in flight."""
        for row in step.rows:
            sequence = row.sequence
            sequence.num_computed += row.num_tokens
            if sequence.score_from is None and sequence.num_computed == sequence.length:
                sequence.num_in_flight_tokens += 1
        for prefill in step.prefills:
            prefill.prompt.num_computed += prefill.num_tokens

    def postprocess(self, step: Step, result: StepResult) -> list[SequenceOutput]:
        """Apply the result of a launched step. Finished and failed sequences leave the batch."""
        outputs = []
        for prompt, start, count in step.prefills:
            sha256 = prompt.ref.sha256
            if self.soft_prompts.get(sha256) is not prompt:
                continue
            if sha256 in result.prefill_errors:
                outputs += self.soft_prompt_failed(sha256, result.prefill_errors[sha256])
            elif start + count == prompt.ref.num_virtual_tokens:
                self.soft_prompt_ready(sha256)
        for row in step.rows:
            if row.is_stale:
                continue
            sequence, end = row.sequence, row.end
            if sequence.request_id in result.errors:
                outputs.append(self.fail(sequence, result.errors[sequence.request_id]))
                continue
            self._blocks.register(sequence, end)
            output = SequenceOutput(sequence.request_id, end, num_cached=sequence.num_cached)
            if sequence.score_from is not None:
                sequence.scores += result.scores.get(sequence.request_id, [])
                if end == sequence.length:
                    output.scores, output.finish_reason = sequence.scores, "length"
                    self._leave(sequence)
                outputs.append(output)
                continue
            token = result.tokens.get(sequence.request_id)
            if token is not None:
                sequence.tokens.append(token)
                sequence.num_in_flight_tokens -= 1
                if sequence.request_id in result.resampled:
                    self._discard_in_flight(sequence, end)
                output.token_ids = [token]
                if sequence.request_id in result.logprobs:
                    output.logprobs = [result.logprobs[sequence.request_id]]
                output.finish_reason = sequence.finish_reason(self.config.eos_token_ids)
                if output.finish_reason is not None:
                    output.stop_token_id = token if output.finish_reason == "stop" else None
                    self._leave(sequence)
            outputs.append(output)
        return outputs

    def should_prefetch(self, ref: SoftPromptRef, reading: int) -> bool:
        """Whether the next step would load this soft prompt, while `reading` others are being read. Prompts being read
        may take a quarter of the cache's size. Called from another thread, the answer is a guess."""
        slots = self.config.max_batch_size - len(self.running)
        blocks = (reading + 1) * -(-ref.num_virtual_tokens // self.config.block_size)
        fits = reading < slots and blocks <= self.config.num_blocks // 4
        return fits and not len(self.waiting) and self.soft_prompts.get(ref.sha256) is None

    def soft_prompt_read(self, sha256: str) -> ResidentSoftPrompt | None:
        """The file of an `embeddings` soft prompt has been read: prefill it from the next step on."""
        prompt = self.soft_prompts.get(sha256)
        if prompt is not None:
            self.soft_prompts.mark_prefilling(prompt)
        return prompt

    def soft_prompt_ready(self, sha256: str) -> None:
        """Its keys and values are in its blocks: sequences that wait for it may be admitted."""
        prompt = self.soft_prompts.get(sha256)
        if prompt is not None:
            self.soft_prompts.mark_ready(prompt)
        parked = self.waiting.unpark(sha256)
        if prompt is not None and prompt.is_retired and not parked:
            self.soft_prompts.evict_when_unused(sha256)

    def soft_prompt_failed(self, sha256: str, message: str) -> list[SequenceOutput]:
        """It could not be loaded: sequences that wait for it, and only those, fail with `message`."""
        self.soft_prompts.drop(sha256)
        failed = self.waiting.unpark(sha256)
        for sequence in failed:
            self.waiting.remove(sequence.request_id)
        return [_failed(sequence, message) for sequence in failed]

    def fail(self, sequence: Sequence, message: str) -> SequenceOutput:
        """Remove a running sequence with an error."""
        output = _failed(sequence, message)
        self._leave(sequence)
        return output

    def stats(self, bytes_per_block: int) -> EngineStats:
        return EngineStats(
            waiting=len(self.waiting),
            running=len(self.running),
            waiting_tokens=self.waiting.num_tokens,
            kv_blocks_used=self.pool.num_used,
            preemptions_total=self._preemptions,
            out_of_memory_total=self._out_of_memory,
            prefix_cache_queries_total=self._prefix_queries,
            prefix_cache_hits_total=self._prefix_hits,
            soft_prompts_resident=len(self.soft_prompts),
            soft_prompt_resident_bytes=self.soft_prompts.num_blocks * bytes_per_block,
            soft_prompt_hits_total=self.soft_prompts.hits,
            soft_prompt_misses_total=self.soft_prompts.misses,
            soft_prompt_evictions_total=self.soft_prompts.evictions,
        )

    def check_integrity(self) -> None:
        """Raise AssertionError when an invariant is broken; for tests and idle moments."""
        prompts = self.soft_prompts.all()
        self.soft_prompts.check_integrity()
        self.pool.check_integrity([s.block_table for s in self.running] + [p.blocks for p in prompts])
        if len(self.running) > self.config.max_batch_size:
            raise AssertionError("more sequences run than there are slots")
        if [s.order for s in self.running] != sorted(s.order for s in self.running):
            raise AssertionError("the running batch is out of order")
        for sequence in self.running:
            if len(sequence.block_table) * self.config.block_size < sequence.num_computed:
                raise AssertionError(f"{sequence.request_id} has computed past its blocks")
        for prompt in prompts:
            users = sum(1 for s in self.running if s.soft_prompt and s.soft_prompt.sha256 == prompt.ref.sha256)
            if users != prompt.users:
                raise AssertionError(f"soft prompt {prompt.ref.sha256} counts {prompt.users} users, has {users}")

    def _continue_decodes(self, step: Step) -> int:
        """Schedule one token per decoding sequence; preempt from the end of the batch when blocks run out."""
        budget = self.config.max_batch_tokens
        index = 0
        while index < len(self.running) and budget > 0:
            sequence = self.running[index]
            if sequence.length - sequence.num_computed == 1 and not sequence.will_end:
                while not self._blocks.grow(sequence):
                    if any(other.will_end for other in self.running):  # its blocks come free after this step
                        break
                    victim = self.running[-1]
                    self._preempt(victim, step)
                    if victim is sequence:
                        return budget
                else:
                    budget -= self._add_row(step, sequence, 1)
            index += 1
        return budget

    def _prefill_soft_prompts(self, step: Step, budget: int, *, others: bool) -> int:
        """Schedule prefills of soft prompts that are not in the step yet; returns how many tokens they take. That is at
        most half of the budget if `others` or waiting sequences could use the rest."""
        share = left = -(-budget // 2) if others or self.waiting.peek() else budget
        known = {prefill.prompt.ref.sha256 for prefill in step.prefills}
        for prompt in self.soft_prompts.prefilling():
            count = min(prompt.ref.num_virtual_tokens - prompt.num_computed, left)
            if count > 0 and prompt.ref.sha256 not in known:
                step.prefills.append(SoftPromptPrefill(prompt, prompt.num_computed, count))
                left -= count
        return share - left

    def _admit(self, step: Step, budget: int) -> None:
        if step.preempted:  # a sequence preempted in this step would come back only to be preempted again
            return
        while budget > 0 and len(self.running) < self._admission_limit:
            sequence = self.waiting.peek()
            if sequence is None:
                return
            prompt = None
            if sequence.soft_prompt is not None:
                prompt = self._resident(sequence.soft_prompt, step)
                if prompt is None:
                    return
                if prompt.state is not LoadState.READY:
                    if sequence.missed_soft_prompt:
                        return  # it was evicted before this sequence's turn: now no sequence may overtake
                    self.soft_prompts.misses += not sequence.was_admitted
                    sequence.missed_soft_prompt = True
                    self.waiting.park(sequence.soft_prompt.sha256)
                    continue
            # Keep one free block per running sequence, which may need it soon. Otherwise a sequence admitted into the
            # last block would be preempted a few steps later.
            if not self._blocks.take(sequence, prompt, spare=len(self.running)):
                return
            self.waiting.pop()
            if prompt is not None and (copy := self._blocks.copy_of_last(sequence, prompt)) is not None:
                step.copies.append(copy)
            if not sequence.was_admitted:
                self._count_admission(sequence)
            bisect.insort(self.running, sequence, key=lambda s: s.order)
            step.admitted.append(sequence.request_id)
            budget -= self._add_row(step, sequence, budget)

    def _resident(self, ref: SoftPromptRef, step: Step) -> ResidentSoftPrompt | None:
        """The soft prompt, resident or loading; None if it can be neither now.

        Only as many soft prompts load at once as there are free slots, so that none loads long before its turn."""
        prompt = self.soft_prompts.get(ref.sha256)
        if prompt is None:
            if self.soft_prompts.num_loading >= self.config.max_batch_size - len(self.running):
                return None
            prompt = self.soft_prompts.reserve(ref, spare=len(self.running))
            if prompt is not None:
                step.soft_prompts_to_load.append(ref)
        return prompt

    def _count_admission(self, sequence: Sequence) -> None:
        """Count hits and misses once per request, not again after a preemption."""
        sequence.was_admitted = True
        self._prefix_queries += sequence.num_prompt
        sequence.num_cached = sequence.num_computed - sequence.num_virtual
        self._prefix_hits += sequence.num_cached
        if sequence.soft_prompt is not None and not sequence.missed_soft_prompt:
            self.soft_prompts.hits += 1

    def _add_row(self, step: Step, sequence: Sequence, budget: int) -> int:
        count = min(sequence.length - sequence.num_computed, budget)
        step.rows.append(StepRow(sequence, sequence.num_computed, count, sequence.epoch))
        return count

    def _preempt(self, sequence: Sequence, step: Step) -> None:
        self._leave(sequence)
        sequence.scores = []
        self.waiting.push(sequence, bounded=False)
        self._preemptions += 1
        step.preempted.append(sequence.request_id)

    def _leave(self, sequence: Sequence) -> None:
        """Remove from the batch, release the blocks and unpin the soft prompt."""
        self._discard_in_flight(sequence, 0)
        self.running.remove(sequence)
        self._admission_limit = self.config.max_batch_size
        self._blocks.give_back(sequence)

    def _discard_in_flight(self, sequence: Sequence, num_computed: int) -> None:
        """Make every step in flight stale for this sequence, and discard its positions from `num_computed` on."""
        sequence.epoch += 1
        sequence.num_in_flight_tokens = 0
        sequence.num_computed = num_computed


def _failed(sequence: Sequence, message: str) -> SequenceOutput:
    return SequenceOutput(sequence.request_id, sequence.num_computed, finish_reason="error", error=message)
