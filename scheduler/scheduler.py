"""Who runs at each step: `schedule()` before it, `mark_in_flight()` at its launch, `postprocess()` after it."""

from __future__ import annotations

from collections.abc import Collection
from itertools import islice

from softbatch.scheduler.batch_invariants import check_batch
from softbatch.scheduler.block_pool import BlockPool
from softbatch.scheduler.decode_shares import SharedPace
from softbatch.scheduler.policy import (
    insert,
    is_background,
    must_preempt,
    precedence,
    preemption_victim,
    slot_giver,
    turn,
)
from softbatch.scheduler.protocol import AddRequest, EngineStats, SequenceOutput
from softbatch.scheduler.scheduler_config import SchedulerConfig
from softbatch.scheduler.sequence import Sequence
from softbatch.scheduler.sequence_blocks import SequenceBlocks
from softbatch.scheduler.soft_prompt_cache import LoadState, SoftPromptCache
from softbatch.scheduler.soft_prompt_loads import SoftPromptLoads
from softbatch.scheduler.step import SoftPromptPrefill, Step, StepResult, StepRow
from softbatch.scheduler.step_pace import StepPace
from softbatch.scheduler.waiting_queue import WaitingQueue, WaitingQueueFull

# So many steps after the last one with somebody who waits for an answer, more are expected any moment.
FOREGROUND_STEPS = 256


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
        self._blocks = SequenceBlocks(self.pool, self.soft_prompts, reuses_output=config.reuses_output)
        self.waiting = WaitingQueue(config.max_queue_size)
        self.soft_prompt_loads = SoftPromptLoads(
            self.soft_prompts, self.waiting, config.max_batch_size, config.num_blocks // 4
        )
        self.pace = StepPace(config.step_target, config.max_batch_tokens)
        self.running: list[Sequence] = []  # in order of precedence
        # Lower than the batch size after the device ran out of memory, until a sequence leaves.
        self._admission_limit = config.max_batch_size
        self.shared_pace = SharedPace(cuts_prefills=config.step_target is not None)
        self._steps = 0
        self._last_foreground = -FOREGROUND_STEPS  # the step that had a row of others than the background
        self._arrivals = 0
        self._prompts_begun = 0  # tokens
        self._preemptions = 0
        self._out_of_memory = 0
        self._prefix_queries = 0
        self._prefix_hits = 0

    @property
    def has_work(self) -> bool:
        return bool(self.running or len(self.waiting) or self.soft_prompts.prefilling())

    def add(self, request: AddRequest) -> SequenceOutput | None:
        """Queue a sequence; returns its refusal if it can never fit or the queue is full."""
        its_turn = turn(self._prompts_begun, len(request.token_ids))
        sequence = Sequence(request, self._arrivals, its_turn, self.config.length_rule)
        self._arrivals += 1
        if sequence.max_length > self.config.max_model_len:
            return sequence.failure(f"prompt and max_tokens together exceed {self.config.max_model_len} tokens")
        if self._blocks.most(sequence) > self.config.num_blocks:
            return sequence.failure("the KV cache is too small for this request")
        try:
            self.waiting.push(sequence)
        except WaitingQueueFull:
            return sequence.failure("the waiting queue is full")
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
        """Shrink a step that ran out of device memory; False if it cannot get smaller.

        First, prefills of soft prompts are postponed. Then sequences are preempted, and admission pauses until a
        sequence leaves. If one row is left, its number of tokens is halved.
        """
        self._out_of_memory += 1
        if step.prefills and len(step.prefills) + len(step.rows) > 1:
            step.prefills.pop()
            return True
        if len(step.rows) > 1:
            sequence = preemption_victim(row.sequence for row in step.rows)
            step.leave_out(sequence)
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
        """Plan the next step: decodes, then prefills of soft prompts, then of sequences, waiting ones included, in
        order of precedence. What runs in the background joins a step that has no prefills of others."""
        step = Step()
        self._steps += 1
        renewed = self._renew() if self.config.length_rule is not None else []
        if len({sequence.owner for sequence in self.running}) > 1:
            step.shares = self.shared_pace.plan(self.running, self.waiting.order, self._steps)
        self._continue_decodes(step, step.shares.chosen if step.shares else None)
        decodes = len(step.rows)
        prefilling = [s for s in self.running if s.length - s.num_computed > 1]
        budget = self._budget_of_prefills(decodes, step, prefilling)
        budget -= self._prefill_soft_prompts(step, budget, others=bool(prefilling))
        for sequence in prefilling:
            if is_background(sequence):
                break
            budget = self._admit(step, budget, before=sequence)
            if budget > 0 and (not step.report.preempted or sequence in self.running):
                budget -= self._add_row(step, sequence, budget)
        self._admit(step, budget)
        if step.rows:
            self._last_foreground = self._steps
        if step.num_tokens == decodes:
            self._schedule_background(step)
        told = {*step.report.admitted, *step.report.preempted}
        step.report.preempted += [s.request_id for s in renewed if s.request_id not in told]
        return step

    def _budget_of_prefills(self, decodes: int, step: Step, prefilling: list[Sequence]) -> int:
        """In tokens. A step is not stretched if whoever is first gets its first token without that."""
        most = step.shares.prefills if step.shares else None
        budget = self.pace.for_prefills(decodes, most)
        lines = [sequence for sequence in (self.waiting.peek(), *prefilling[:1]) if sequence is not None]
        first = min(lines, key=precedence, default=None)
        if first is not None and self._blocks.num_to_compute(first) > budget:
            free = max(0, self.config.max_batch_size - len(self.running))
            queue = [*prefilling, *islice(self.waiting, free)]
            lengths = [self._blocks.num_to_compute(s) for s in queue if not is_background(s)]
            budget = self.pace.for_prefills(decodes, most, behind=sum(lengths) - max(lengths, default=0))
        return budget

    def _schedule_background(self, step: Step) -> None:
        """Whoever arrives waits for the end of a step: while others than these come, their prefills are cut short."""
        following = self.waiting.peek()
        if not (self.running and is_background(self.running[-1])) and not (following and is_background(following)):
            return
        self._continue_decodes(step, None, background=True)
        budget = self.config.max_batch_tokens - step.num_tokens
        is_alone = self._steps - self._last_foreground > FOREGROUND_STEPS
        budget = min(budget, self.pace.for_prefills(step.num_tokens, background=not is_alone))
        for sequence in [s for s in self.running if is_background(s) and s.length - s.num_computed > 1]:
            if budget > 0:
                budget -= self._add_row(step, sequence, budget)
        self._admit(step, budget, background=True)

    def admit_late(self, step: Step) -> None:
        """Add soft prompts that were read after `schedule()`, and sequences that waited for them, within the token
        budget."""
        decodes = sum(1 for row in step.rows if row.num_tokens == 1)
        most = step.shares.prefills if step.shares else None
        budget = self.pace.for_prefills(decodes, most) - (step.num_tokens - decodes)
        self._admit(step, budget - self._prefill_soft_prompts(step, budget, others=False), displacing=False)

    def mark_in_flight(self, step: Step) -> None:
        """Count the step's positions as computed and the tokens it will sample as in flight."""
        for row in step.rows:
            sequence = row.sequence
            sequence.num_computed += row.num_tokens
            if sequence.num_computed == sequence.length and sequence.params.max_tokens > 0:
                sequence.num_in_flight_tokens += 1
        for prefill in step.prefills:
            prefill.prompt.num_computed += prefill.num_tokens

    def postprocess(self, step: Step, result: StepResult) -> list[SequenceOutput]:
        """Apply the result of a launched step. Finished and failed sequences leave the batch."""
        outputs = self.soft_prompt_loads.postprocess(step, result)
        for row in step.rows:
            if row.is_stale:
                continue
            sequence, end = row.sequence, row.end
            if sequence.request_id in result.errors:
                outputs.append(sequence.failure(result.errors[sequence.request_id]))
                self._leave(sequence)
                continue
            last = end if self.config.reuses_output else min(end, sequence.num_virtual + sequence.num_prompt)
            self._blocks.register(sequence, last)
            output = SequenceOutput(sequence.request_id, end, num_cached=sequence.num_cached)
            if sequence.score_from is not None:
                sequence.scores += result.scores.get(sequence.request_id, [])
                if sequence.request_id in result.state_sums:
                    sequence.add_states(result.state_sums[sequence.request_id])
                if end >= sequence.num_virtual + sequence.num_prompt:
                    output.scores, sequence.scores, sequence.score_from = sequence.scores, [], None
                    if sequence.pooling is not None:
                        output.embedding = sequence.take_embedding()
                    if sequence.params.max_tokens == 0:
                        output.finish_reason = "length"
                        self._leave(sequence)
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
        check_batch(self.running, prompts, self.config)

    def observe(self, step: Step, seconds: float) -> None:
        """A step took so long."""
        self.pace.observe(step.num_tokens, seconds)
        prefilled = step.prefilled()
        self.shared_pace.observe(step.num_tokens - sum(prefilled.values()), prefilled, step.shares, seconds)

    def _continue_decodes(self, step: Step, chosen: Collection[Sequence] | None, *, background: bool = False) -> None:
        """Schedule one token for each decoding sequence, or each of those chosen. If blocks run out, preempt."""
        budget = self.config.max_batch_tokens - len(step.rows)
        index = 0
        while index < len(self.running) and budget > 0:
            sequence = self.running[index]
            is_asked = is_background(sequence) is background and (chosen is None or sequence in chosen)
            if is_asked and sequence.is_decoding:
                while not self._blocks.grow(sequence):
                    if not must_preempt(self.running):
                        break
                    victim = preemption_victim(self.running)
                    self._preempt(victim, step)
                    if victim is sequence:
                        return
                else:
                    budget -= self._add_row(step, sequence, 1)
            index += 1

    def _prefill_soft_prompts(self, step: Step, budget: int, *, others: bool) -> int:
        """Schedule prefills of soft prompts that are not in the step yet. Returns how many tokens they take, at most
        half of the budget if `others` or waiting sequences could use the rest."""
        share = left = -(-budget // 2) if others or self.waiting.peek() else budget
        known = {prefill.prompt.ref.sha256 for prefill in step.prefills}
        for prompt in self.soft_prompts.prefilling():
            count = min(prompt.ref.num_virtual_tokens - prompt.num_computed, left)
            if count > 0 and prompt.ref.sha256 not in known:
                step.prefills.append(SoftPromptPrefill(prompt, prompt.num_computed, count))
                left -= count
        return share - left

    def _admit(
        self,
        step: Step,
        budget: int,
        *,
        before: Sequence | None = None,
        background: bool = False,
        displacing: bool = True,
    ) -> int:
        """Admit waiting sequences while slots, blocks and token budget last, or only those that precede `before`. Park
        those whose soft prompt loads. Returns the remaining token budget. Those of the background are admitted only if
        that is asked for, and with `displacing` they leave the batch for others that find no room."""
        if step.report.preempted:
            return budget  # a sequence that this step preempted would be admitted only to be preempted again
        while budget > 0:
            sequence = self.waiting.peek()
            if sequence is None or (before is not None and precedence(before) < precedence(sequence)):
                break
            if is_background(sequence) and not background:
                break
            giver = None
            if len(self.running) >= self._admission_limit and not (displacing and self._displace(sequence, step)):
                giver = self._slot_giver(sequence) if displacing else None
                if giver is None:
                    break
            prompt = None
            if sequence.soft_prompt is not None:
                prompt = self.soft_prompt_loads.find(sequence.soft_prompt, step, len(self.running))
                if prompt is None:
                    if displacing and self._displace(sequence, step):
                        continue
                    break
                if prompt.state is not LoadState.READY:
                    if sequence.missed_soft_prompt:
                        break  # the soft prompt was evicted before this sequence's turn: no sequence may overtake now
                    self.soft_prompts.misses += not sequence.was_admitted
                    sequence.missed_soft_prompt = True
                    self.waiting.park(sequence.soft_prompt.sha256)
                    continue
            # Keep one free block per running sequence. Otherwise a sequence that is admitted into the last block would
            # be preempted a few steps later.
            if not self._blocks.take(sequence, prompt, spare=len(self.running)):
                if displacing and self._displace(sequence, step):
                    continue  # from the start, for a deleted soft prompt goes with its last user
                break
            self.waiting.pop()
            if giver is not None:  # only now, as it may be the next to be admitted again
                step.leave_out(giver)
                self._preempt(giver, step, gave_way=True)
            if prompt is not None and (copy := self._blocks.copy_of_last(sequence, prompt)) is not None:
                step.copies.append(copy)
            if not sequence.was_admitted:
                self._count_admission(sequence)
            insert(self.running, sequence)
            step.report.admitted.append(sequence.request_id)
            budget -= self._add_row(step, sequence, budget)
        return budget

    def _displace(self, sequence: Sequence, step: Step) -> bool:
        """Preempt a sequence of the background, which has no row yet, for one that is not; False if there is none."""
        victim = self.running[-1] if self.running else None
        if victim is None or is_background(sequence) or not is_background(victim):
            return False
        self._preempt(victim, step)
        return True

    def _slot_giver(self, sequence: Sequence) -> Sequence | None:
        """Who leaves for a sequence if its owner has no slot, and all are taken, also by those in the next step."""
        is_full = len(self.running) >= self.config.max_batch_size and must_preempt(self.running)
        return slot_giver(sequence, self.running) if is_full and not is_background(sequence) else None

    def _count_admission(self, sequence: Sequence) -> None:
        """Count hits and misses once per request, not again after a preemption."""
        sequence.was_admitted = True
        self._prompts_begun += sequence.length - sequence.num_computed
        self.waiting.order.charge(sequence, sequence.length - sequence.num_computed)
        self._prefix_queries += sequence.num_prompt
        sequence.num_cached = min(sequence.num_computed - sequence.num_virtual, sequence.num_prompt)
        self._prefix_hits += sequence.num_cached
        if sequence.soft_prompt is not None and not sequence.missed_soft_prompt:
            self.soft_prompts.hits += 1

    def _add_row(self, step: Step, sequence: Sequence, budget: int) -> int:
        count = min(sequence.length - sequence.num_computed, budget)
        if sequence.score_from is not None:
            count = self._with_room_for_logits(step, sequence, count)
            if count == 0:
                return 0
        step.rows.append(StepRow(sequence, sequence.num_computed, count, sequence.epoch))
        return count

    def _with_room_for_logits(self, step: Step, sequence: Sequence, count: int) -> int:
        scored = sequence.scored_rows(sequence.num_computed, count)
        left = self.config.max_scored_tokens - step.num_scored
        return min(count, scored.start + left) if scored else count

    def _renew(self) -> list[Sequence]:
        """Sequences that have become long return to their place in the queue, to be computed again."""
        outgrown = [sequence for sequence in self.running if sequence.is_outgrown]
        renewed = [sequence for sequence in outgrown if sequence.num_in_flight_tokens == 0]
        for sequence in renewed:
            self._leave(sequence)
            sequence.turn_as_long()
            self.waiting.push(sequence, bounded=False)
        return renewed

    def _preempt(self, sequence: Sequence, step: Step, *, gave_way: bool = False) -> None:
        self._leave(sequence)
        sequence.gave_way = gave_way
        sequence.scores, sequence.state_sum = [], []
        self.waiting.push(sequence, bounded=False)
        self._preemptions += not gave_way
        step.report.preempted.append(sequence.request_id)

    def _leave(self, sequence: Sequence) -> None:
        """Remove the sequence from the batch, release its blocks and unpin its soft prompt."""
        self._discard_in_flight(sequence, 0)
        self.running.remove(sequence)
        self._admission_limit = self.config.max_batch_size
        self._blocks.give_back(sequence)
        self.waiting.order.charge(sequence, sequence.num_generated - sequence.num_charged)
        sequence.num_charged = sequence.num_generated

    def _discard_in_flight(self, sequence: Sequence, num_computed: int) -> None:
        """Make every step in flight stale for this sequence, and discard its positions from `num_computed` on."""
        sequence.epoch += 1
        sequence.num_in_flight_tokens = 0
        sequence.num_computed = num_computed
