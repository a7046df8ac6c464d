"""Who runs at each step: `schedule()` before it, `launched()` once it is on its way, `postprocess()` after it."""

from __future__ import annotations

import bisect
from dataclasses import dataclass

from softbatch.scheduler.block_pool import BlockPool
from softbatch.scheduler.protocol import AddRequest, EngineStats, SequenceOutput, SoftPromptRef
from softbatch.scheduler.sequence import Sequence
from softbatch.scheduler.sequence_blocks import SequenceBlocks
from softbatch.scheduler.soft_prompt_cache import Residency, ResidentSoftPrompt, SoftPromptCache
from softbatch.scheduler.step import Fill, Step, StepResult, StepRow
from softbatch.scheduler.waiting_queue import QueueFull, WaitingQueue


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

    Invariants, checked by `check_integrity`: at most `max_batch_size` run; every block has exactly the references
    of its owners; a running sequence has blocks for everything it has computed. Decoding sequences go first in
    every step, so that a long prefill never halts them.

    A step may be scheduled while the one before is on its way, as if that had ended and nobody with it. Rows of those
    who leave meanwhile count for nothing; what they write into blocks that are free again, comes before anything that
    a later step writes there, as steps run one after another.
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
        self._most_running = config.max_batch_size  # fewer after the device ran out of memory, until somebody leaves
        self._prefix_queries = 0
        self._prefix_hits = 0

    @property
    def has_work(self) -> bool:
        return bool(self.running or len(self.waiting) or self.soft_prompts.filling())

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
        except QueueFull:
            return _failed(sequence, "the waiting queue is full")
        return None

    def cancel(self, request_id: str) -> bool:
        """Take a sequence out at once; False if it is not known (any more)."""
        if self.waiting.remove(request_id):
            return True
        for sequence in self.running:
            if sequence.request_id == request_id:
                self._leave(sequence)
                return True
        return False

    def shrink(self, step: Step) -> bool:
        """The device ran out of memory in this step: make it smaller; False if nothing can be taken from it.

        Soft prompts that are being computed wait for a later step, then the newest sequence is preempted, and one that
        is alone is computed in two halves. Nobody is admitted until a sequence has left.
        """
        self._out_of_memory += 1
        if step.fills and len(step.fills) + len(step.rows) > 1:
            step.fills.pop()
            return True
        if len(step.rows) > 1:
            sequence = max((row.sequence for row in step.rows), key=lambda s: s.order)
            step.rows = [row for row in step.rows if row.sequence is not sequence]
            step.copies = [copy for copy in step.copies if copy[1] not in sequence.block_table]
            step.admitted = [name for name in step.admitted if name != sequence.request_id]
            self._preempt(sequence, step)
            self._most_running = len(self.running)
            return True
        step.rows = [row._replace(num_tokens=row.num_tokens // 2) for row in step.rows if row.num_tokens > 1]
        step.fills = [fill._replace(num_tokens=fill.num_tokens // 2) for fill in step.fills if fill.num_tokens > 1]
        return bool(step)

    def hold_back(self) -> None:
        """The device had no memory for something beside a step: nobody is admitted until a sequence has left."""
        self._out_of_memory += 1
        self._most_running = len(self.running)

    def schedule(self) -> Step:
        step = Step()
        budget = self._continue_decodes(step)
        prefilling = [s for s in self.running if s.length - s.num_computed > 1]
        budget -= self._fill(step, budget, others=bool(prefilling))
        for sequence in prefilling:
            if budget > 0:
                budget -= self._add_row(step, sequence, budget)
        self._admit(step, budget)
        return step

    def join(self, step: Step) -> None:
        """Take into the step, where it has room, the soft prompts that have been read since it was scheduled, and
        those who waited for them."""
        budget = self.config.max_batch_tokens - step.num_tokens
        self._admit(step, budget - self._fill(step, budget, others=False))

    def launched(self, step: Step) -> None:
        """The step is on its way: what it computes counts as computed, what it samples as a token to come."""
        for row in step.rows:
            sequence = row.sequence
            sequence.num_computed += row.num_tokens
            if sequence.score_from is None and sequence.num_computed == sequence.length:
                sequence.num_pending += 1
        for fill in step.fills:
            fill.prompt.num_computed += fill.num_tokens

    def postprocess(self, step: Step, result: StepResult) -> list[SequenceOutput]:
        """Take in what came of a launched step; finished and failed sequences leave the batch and free their slots."""
        outputs = []
        for prompt, start, count in step.fills:
            sha256 = prompt.ref.sha256
            if self.soft_prompts.get(sha256) is not prompt:
                continue
            if sha256 in result.fill_errors:
                outputs += self.soft_prompt_failed(sha256, result.fill_errors[sha256])
            elif start + count == prompt.ref.num_virtual_tokens:
                self.soft_prompt_ready(sha256)
        for row in step.rows:
            if row.is_void:
                continue
            sequence, end = row.sequence, row.end
            if sequence.request_id in result.errors:
                outputs.append(self.fail(sequence, result.errors[sequence.request_id]))
                continue
            self._blocks.register(sequence, end)
            output = SequenceOutput(sequence.request_id, end)
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
                sequence.num_pending -= 1
                if sequence.request_id in result.revised:
                    self._forget_steps(sequence, end)
                output.token_ids = [token]
                if sequence.request_id in result.logprobs:
                    output.logprobs = [result.logprobs[sequence.request_id]]
                output.finish_reason = sequence.finish_reason(self.config.eos_token_ids)
                if output.finish_reason is not None:
                    output.stop_token_id = token if output.finish_reason == "stop" else None
                    self._leave(sequence)
            outputs.append(output)
        return outputs

    def would_load(self, ref: SoftPromptRef, reading: int) -> bool:
        """Whether a soft prompt will be read as soon as a request for it is here, beside `reading` others that may take
        a quarter of the cache's size in memory. From another thread than the engine's this is a guess."""
        slots = self.config.max_batch_size - len(self.running)
        blocks = (reading + 1) * -(-ref.num_virtual_tokens // self.config.block_size)
        fits = reading < slots and blocks <= self.config.num_blocks // 4
        return fits and not len(self.waiting) and self.soft_prompts.get(ref.sha256) is None

    def soft_prompt_read(self, sha256: str) -> ResidentSoftPrompt | None:
        """The file of an `embeddings` soft prompt has been read: compute its keys and values from now on."""
        prompt = self.soft_prompts.get(sha256)
        if prompt is not None:
            self.soft_prompts.mark_filling(prompt)
        return prompt

    def soft_prompt_ready(self, sha256: str) -> None:
        """Its keys and values lie in its blocks: admit those who wait for it."""
        prompt = self.soft_prompts.get(sha256)
        if prompt is not None:
            self.soft_prompts.mark_ready(prompt)
        parked = self.waiting.unpark(sha256)
        if prompt is not None and prompt.forgotten and not parked:
            self.soft_prompts.forget(sha256)

    def soft_prompt_failed(self, sha256: str, message: str) -> list[SequenceOutput]:
        """It could not be loaded: those who wait for it fail with `message`, nobody else."""
        self.soft_prompts.abandon(sha256)
        failed = self.waiting.unpark(sha256)
        for sequence in failed:
            self.waiting.remove(sequence.request_id)
        return [_failed(sequence, message) for sequence in failed]

    def fail(self, sequence: Sequence, message: str) -> SequenceOutput:
        """Take a running sequence out with an error."""
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
        """Give every decoding sequence its one token, preempting from the end when blocks run out."""
        budget = self.config.max_batch_tokens
        index = 0
        while index < len(self.running) and budget > 0:
            sequence = self.running[index]
            if sequence.length - sequence.num_computed == 1 and not sequence.will_end:
                while not self._blocks.grow(sequence):
                    if any(other.will_end for other in self.running):  # and give its blocks back, after this step
                        break
                    victim = self.running[-1]
                    self._preempt(victim, step)
                    if victim is sequence:
                        return budget
                else:
                    budget -= self._add_row(step, sequence, 1)
            index += 1
        return budget

    def _fill(self, step: Step, budget: int, *, others: bool) -> int:
        """Compute soft prompts that are not in the step yet; returns the tokens taken: at most half of the budget while
        `others`, or those who wait, have a use for it."""
        share = left = -(-budget // 2) if others or self.waiting.peek() else budget
        known = {fill.prompt.ref.sha256 for fill in step.fills}
        for prompt in self.soft_prompts.filling():
            count = min(prompt.ref.num_virtual_tokens - prompt.num_computed, left)
            if count > 0 and prompt.ref.sha256 not in known:
                step.fills.append(Fill(prompt, prompt.num_computed, count))
                left -= count
        return share - left

    def _admit(self, step: Step, budget: int) -> None:
        if step.preempted:  # whoever had to leave just now would only come back to leave again
            return
        while budget > 0 and len(self.running) < self._most_running:
            sequence = self.waiting.peek()
            if sequence is None:
                return
            prompt = None
            if sequence.soft_prompt is not None:
                prompt = self._resident(sequence.soft_prompt, step)
                if prompt is None:
                    return
                if prompt.state is not Residency.READY:
                    if sequence.missed_soft_prompt:
                        return  # it was evicted again before this one's turn: from now on nobody overtakes
                    self.soft_prompts.misses += not sequence.was_admitted
                    sequence.missed_soft_prompt = True
                    self.waiting.park(sequence.soft_prompt.sha256)
                    continue
            # One free block for each running sequence, which may need it soon: without that, a sequence admitted into
            # the last block would be preempted a few steps later.
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
        """The soft prompt in its blocks, or on its way there; None if it cannot be brought there now.

        No more are loaded at once than there are free slots, so that none is loaded long before its turn."""
        prompt = self.soft_prompts.get(ref.sha256)
        if prompt is None:
            if self.soft_prompts.num_loading >= self.config.max_batch_size - len(self.running):
                return None
            prompt = self.soft_prompts.reserve(ref, spare=len(self.running))
            if prompt is not None:
                step.reads.append(ref)
        return prompt

    def _count_admission(self, sequence: Sequence) -> None:
        """Hits and misses count a request once, not again after a preemption."""
        sequence.was_admitted = True
        self._prefix_queries += sequence.num_prompt
        self._prefix_hits += sequence.num_computed - sequence.num_virtual
        if sequence.soft_prompt is not None and not sequence.missed_soft_prompt:
            self.soft_prompts.hits += 1

    def _add_row(self, step: Step, sequence: Sequence, budget: int) -> int:
        count = min(sequence.length - sequence.num_computed, budget)
        step.rows.append(StepRow(sequence, sequence.num_computed, count, sequence.attempt))
        return count

    def _preempt(self, sequence: Sequence, step: Step) -> None:
        self._leave(sequence)
        sequence.scores = []
        self.waiting.push(sequence, bounded=False)
        self._preemptions += 1
        step.preempted.append(sequence.request_id)

    def _leave(self, sequence: Sequence) -> None:
        """Out of the batch: blocks and the pin on the soft prompt go back."""
        self._forget_steps(sequence, 0)
        self.running.remove(sequence)
        self._most_running = self.config.max_batch_size
        self._blocks.give_back(sequence)

    def _forget_steps(self, sequence: Sequence, num_computed: int) -> None:
        """Whatever is on its way for this sequence counts for nothing, and neither do positions from here on."""
        sequence.attempt += 1
        sequence.num_pending = 0
        sequence.num_computed = num_computed


def _failed(sequence: Sequence, message: str) -> SequenceOutput:
    return SequenceOutput(sequence.request_id, sequence.num_computed, finish_reason="error", error=message)
