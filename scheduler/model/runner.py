"""Launches the steps that the scheduler plans: rows in, sampled tokens out."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch

from softbatch.prompt_store.soft_prompt_file import ModelSpec, check_fits, load
from softbatch.scheduler.model.batch import BatchBuilder, Row, build_batch
from softbatch.scheduler.model.cuda.device_memory import is_shortage
from softbatch.scheduler.model.forward import Forward
from softbatch.scheduler.model.in_flight import InFlightStep, StepScores
from softbatch.scheduler.model.kv_cache import KVCache, StagedBlocks
from softbatch.scheduler.model.sampling.adjustments import SampleInput, needs_history
from softbatch.scheduler.model.sampling.constraints import Constraint, Constraints
from softbatch.scheduler.model.sampling.grammar import GrammarError, GrammarMasks
from softbatch.scheduler.model.sampling.sampler import own_choice, sample
from softbatch.scheduler.model.staging import ToHost, small_tensor
from softbatch.scheduler.protocol import SoftPromptRef
from softbatch.scheduler.sequence import Sequence
from softbatch.scheduler.soft_prompt_cache import ResidentSoftPrompt
from softbatch.scheduler.step import DeviceLost, OutOfDeviceMemory, SoftPromptPrefill, Step, StepRow

logger = logging.getLogger(__name__)
_PREFILL_FAILED = "the model failed on this soft prompt"
_FREE = Constraint()


@dataclass(frozen=True, eq=False)
class StagedSoftPrompt:
    """A soft prompt that has been read and checked: KV blocks to copy, or embeddings [n, hidden] to prefill."""

    blocks: StagedBlocks | None = None
    embeddings: torch.Tensor | None = None


class Runner:
    """Owns the KV cache and the model. A row that fails does not change the results of the others.

    A step may be launched while the step before is in flight. It then takes that step's tokens from the device."""

    def __init__(
        self,
        forward: Forward,
        kv_cache: KVCache,
        spec: ModelSpec,
        max_prompt_bytes: int,
        build: BatchBuilder | None = None,
        grammars: GrammarMasks | None = None,
    ) -> None:
        self._forward = forward
        self._kv_cache = kv_cache
        self._build = build or partial(build_batch, block_size=kv_cache.block_size, device=kv_cache.device)
        self._spec = spec
        self._constraints = Constraints(grammars)
        self._max_prompt_bytes = max_prompt_bytes
        self._on_gpu = kv_cache.device.type == "cuda"
        self._prefilling: dict[str, torch.Tensor] = {}
        self._newest = InFlightStep()

    @torch.inference_mode()
    def launch(self, step: Step) -> InFlightStep:
        """Compute every row of the step. If that raises, each row is run again alone, and only rows that raise again
        are reported as failed. Writing the same keys and values twice does no harm.

        On a GPU, the work is only queued. Raises OutOfDeviceMemory and DeviceLost."""
        with _as_out_of_device_memory():
            self._newest = self._launch(step)
        return self._newest

    def _launch(self, step: Step) -> InFlightStep:
        if step.copies:
            self._kv_cache.copy_blocks(step.copies)
        # A soft prompt may have failed in the step before. The scheduler did not know that when it planned this one.
        prefills = [prefill for prefill in step.prefills if prefill.prompt.ref.sha256 in self._prefilling]
        lost = {prefill.prompt.ref.sha256: _PREFILL_FAILED for prefill in step.prefills if prefill not in prefills}
        launched = InFlightStep(prefill_errors=dict(lost))
        if not (step.rows or prefills):
            return launched
        try:
            self._run(step.rows, prefills, launched)
        except Exception as error:
            if is_shortage(error):
                raise
            logger.exception("a step failed; running its rows one by one")
            self._check_device()
            launched = InFlightStep(prefill_errors=dict(lost))
            for row in step.rows:
                try:
                    self._run([row], [], launched)
                except Exception as error:
                    if is_shortage(error):
                        raise
                    logger.exception("request %s failed", row.sequence.request_id)
                    launched.errors[row.sequence.request_id] = "the model failed on this request"
            for prefill in prefills:
                try:
                    self._run([], [prefill], launched)
                except Exception as error:
                    if is_shortage(error):
                        raise
                    logger.exception("soft prompt %s failed", prefill.prompt.ref.sha256)
                    launched.prefill_errors[prefill.prompt.ref.sha256] = _PREFILL_FAILED
        for prefill in prefills:
            sha256 = prefill.prompt.ref.sha256
            if prefill.is_last or sha256 in launched.prefill_errors:
                self._prefilling.pop(sha256, None)
        return launched

    def prepare_to_read(self) -> None:
        """Limit torch to the calling thread: a second team of threads would compete with the running step for cores."""
        torch.set_num_threads(1)

    @torch.inference_mode()
    def read_soft_prompt(self, ref: SoftPromptRef) -> StagedSoftPrompt:
        """Read and check a soft prompt's file, and lay it out for the cache. Thread-safe. Raises SoftPromptError."""
        prompt = load(Path(ref.path), self._max_prompt_bytes)
        check_fits(prompt, self._spec)
        if prompt.manifest.kind == "kv":
            return StagedSoftPrompt(blocks=self._kv_cache.stage(prompt.tensors["keys"], prompt.tensors["values"]))
        embeddings = prompt.tensors["embeddings"].to(self._kv_cache.dtype)
        return StagedSoftPrompt(embeddings=embeddings.pin_memory() if self._on_gpu else embeddings)

    @torch.inference_mode()
    def place_soft_prompt(self, resident: ResidentSoftPrompt, staged: StagedSoftPrompt) -> bool:
        """Copy a soft prompt into its blocks. False if it has embeddings instead, which steps have to prefill.

        Raises OutOfDeviceMemory and DeviceLost."""
        with _as_out_of_device_memory():
            try:
                if staged.blocks is not None:
                    self._kv_cache.write(resident.blocks, staged.blocks)
                if staged.embeddings is not None:
                    device = self._kv_cache.device
                    self._prefilling[resident.ref.sha256] = staged.embeddings.to(device, non_blocking=True)
            except Exception as error:
                if not is_shortage(error):
                    self._check_device()
                raise
        return staged.embeddings is None

    def _run(self, rows: list[StepRow], prefills: list[SoftPromptPrefill], launched: InFlightStep) -> None:
        pooled = [row for row in rows if row.sequence.pooling is not None]
        if pooled:
            self._pool(pooled, launched)
            rows = [row for row in rows if row.sequence.pooling is None]
            if not (rows or prefills):
                return
        parts = [part for row in rows for part in _as_rows(row, self._on_gpu)]
        batch = self._build(parts + [self._prefill_row(prefill) for prefill in prefills])
        self._insert_pending(rows, batch.token_ids)
        logits = self._forward(batch)
        sampled, at = [], 0
        for row in rows:
            wanted = len(row.sequence.logit_rows(row.start, row.num_tokens))
            scored = _add_scores(row, logits[at:], launched) if row.sequence.score_from is not None else 0
            if wanted > scored:
                sampled.append((row.sequence, at + scored))
            at += wanted
        if sampled:
            self._sample(sampled, logits, launched)

    def _sample(self, sampled: list[tuple[Sequence, int]], logits: torch.Tensor, launched: InFlightStep) -> None:
        """A token for each of these sequences, by the logits in its row."""
        own_choices = {
            sequence.request_id: token
            for sequence, row in sampled
            if sequence.params.grammar and (token := own_choice(logits[row], sequence.params)) is not None
        }
        sequences = (sequence for sequence, _ in sampled)
        constraints = self._constraints.of(sequences, logits.shape[-1], own_choices)
        inputs, names, at = [], [], []
        for sequence, row in sampled:
            constraint = constraints.get(sequence.request_id, _FREE)
            if isinstance(constraint, GrammarError):
                message = f"the output's grammar cannot be followed: {constraint}"
                launched.errors[sequence.request_id] = message
                continue
            inputs.append(self._sample_input(sequence, constraint))
            names.append(sequence.request_id)
            at.append(row)
        if not inputs:
            return
        if len(at) < len(logits):
            logits = logits[small_tensor(at, logits.device, torch.int64)]
        launched.add_samples(names, sample(logits, inputs))

    def _pool(self, rows: list[StepRow], launched: InFlightStep) -> None:
        """A forward pass of their own: it ends before the head, which others need."""
        states = self._forward.hidden_states(
            self._build([part for row in rows for part in _as_rows(row, self._on_gpu)])
        )
        at = 0
        for row in rows:
            count = len(row.sequence.logit_rows(row.start, row.num_tokens))
            if count:
                whole = states[at : at + count].sum(0, dtype=torch.float32)
                launched.state_sums[row.sequence.request_id] = ToHost([whole])
            at += count

    def _insert_pending(self, rows: list[StepRow], token_ids: torch.Tensor) -> None:
        """Fill in input tokens that only the device knows: the step in flight samples them."""
        places, request_ids, at = [], [], 0
        for row in rows:
            at += row.num_tokens
            if _ends_with_pending(row):
                places.append(at - 1)
                request_ids.append(row.sequence.request_id)
        tokens = self._newest.tokens_of(request_ids) if places else None
        if tokens is not None:
            token_ids[small_tensor(places, token_ids.device, torch.int64)] = tokens

    def prepare_grammar(self, grammar: str) -> None:
        """Compile a grammar that will be asked for; safe to call from another thread."""
        self._constraints.prepare(grammar)

    def _sample_input(self, s: Sequence, constraint: Constraint) -> SampleInput:
        is_missing = s.num_in_flight_tokens > 0 and needs_history(s.params)
        pending = self._newest.tokens_of([s.request_id]) if is_missing else None
        return SampleInput(s.params, s.tokens, s.num_prompt, s.length, pending, constraint.barred, constraint.mask)

    def forward(self, rows: list[Row]) -> torch.Tensor:
        """Logits of the rows' `logit_rows`, one after another: [R, vocab]."""
        return self._forward(self._build(rows))

    def _check_device(self) -> None:
        """Raises DeviceLost if the GPU refuses further work, as after an illegal address or a failed assertion."""
        if self._on_gpu:
            try:
                torch.cuda.synchronize(self._kv_cache.device)
            except RuntimeError as error:
                raise DeviceLost(str(error)) from error

    def _prefill_row(self, prefill: SoftPromptPrefill) -> Row:
        embeddings = self._prefilling[prefill.prompt.ref.sha256][prefill.start : prefill.start + prefill.num_tokens]
        prompt = prefill.prompt
        return Row(
            prefill.start, (), prompt.blocks, range(0), embeddings, decodes=False, turned_for=prompt.ref.turned_for
        )


@contextmanager
def _as_out_of_device_memory() -> Iterator[None]:
    """Turns the various errors for a full device into OutOfDeviceMemory."""
    try:
        yield
    except RuntimeError as error:
        if not is_shortage(error):
            raise
        torch.cuda.empty_cache()
        raise OutOfDeviceMemory from error


def _as_rows(row: StepRow, on_gpu: bool) -> list[Row]:
    """Output tokens that are computed again, after a preemption or for another engine, are rows of their own.

    Attention on CPUs takes tokens that were sampled another way than a prompt's: so what is sampled behind them is the
    same to the last bit."""
    sequence = row.sequence
    first = row.start - sequence.num_virtual
    tokens = sequence.tokens[first : first + row.num_tokens]
    if _ends_with_pending(row):
        tokens.append(0)
    known = row.num_tokens if on_gpu else min(max(sequence.num_prompt - first, 0), row.num_tokens)
    cuts = [0, *range(max(known, 1), row.num_tokens + 1)]
    return [
        Row(
            row.start + start,
            tokens[start:end],
            sequence.block_table,
            sequence.logit_rows(row.start + start, end - start),
            decodes=start >= known,
            turned_for=sequence.turned_for,
        )
        for start, end in pairwise(cuts)
    ]


def _add_scores(row: StepRow, logits: torch.Tensor, launched: InFlightStep) -> int:
    """Score what the row holds of a prompt, by the first of these logits; returns how many they are."""
    sequence = row.sequence
    scored = sequence.scored_rows(row.start, row.num_tokens)
    if scored:
        following = row.start - sequence.num_virtual + 1
        tokens = sequence.tokens[following + scored.start : following + scored.stop]
        launched.scores[sequence.request_id] = StepScores(logits[: len(scored)], tokens, sequence.score_top)
    return len(scored)


def _ends_with_pending(row: StepRow) -> bool:
    return row.sequence.num_in_flight_tokens > 0 and row.end == row.sequence.length
