"""Runs one step on the model: blocks in, sampled tokens out."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from prompt_store.soft_prompt import ModelSpec, check_fits, load
from scheduler.messages import SoftPromptRef
from scheduler.model.batch import BatchBuilder, Row, build_batch
from scheduler.model.forward import Forward
from scheduler.model.kv_cache import KVCache, StagedBlocks
from scheduler.model.sampler import SampleInput, sample
from scheduler.model.staging import small_tensor
from scheduler.sequence import Sequence
from scheduler.soft_prompts import ResidentSoftPrompt
from scheduler.step import DeviceLost, OutOfDeviceMemory, Step, StepResult

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class StagedSoftPrompt:
    """A soft prompt that has been read and fits the model: as KV blocks, or as embeddings [n, hidden] to compute."""

    blocks: StagedBlocks | None = None
    embeddings: torch.Tensor | None = None


class Runner:
    """Owns the KV cache and the way the model is run. A row that fails, fails alone: the others' results still come."""

    def __init__(
        self,
        forward: Forward,
        kv_cache: KVCache,
        spec: ModelSpec,
        max_prompt_bytes: int,
        build: BatchBuilder | None = None,
    ) -> None:
        self._forward = forward
        self._kv_cache = kv_cache
        self._build = build or partial(build_batch, block_size=kv_cache.block_size, device=kv_cache.device)
        self._spec = spec
        self._max_prompt_bytes = max_prompt_bytes
        self._on_gpu = kv_cache.device.type == "cuda"
        self._filling: dict[str, torch.Tensor] = {}

    @torch.inference_mode()
    def execute(self, step: Step) -> StepResult:
        """Compute every row of the step. If that raises, each row is run once more alone and only those that
        raise again are reported as failed; writing the same keys and values twice changes nothing.

        Raises OutOfDeviceMemory and DeviceLost."""
        with _shortage_told():
            return self._execute(step)

    def _execute(self, step: Step) -> StepResult:
        if step.copies:
            self._kv_cache.copy_blocks(step.copies)
        result = StepResult(tokens={}, logprobs={}, scores={}, errors={}, fill_errors={})
        try:
            self._run(step.rows, step.fills, result)
        except Exception as error:
            if _is_shortage(error):
                raise
            logger.exception("a step failed; running its rows one by one")
            self._check_device()
            for row in step.rows:
                try:
                    self._run([row], [], result)
                except Exception as error:
                    if _is_shortage(error):
                        raise
                    logger.exception("request %s failed", row[0].request_id)
                    result.errors[row[0].request_id] = "the model failed on this request"
            for fill in step.fills:
                try:
                    self._run([], [fill], result)
                except Exception as error:
                    if _is_shortage(error):
                        raise
                    logger.exception("soft prompt %s failed", fill[0].ref.sha256)
                    result.fill_errors[fill[0].ref.sha256] = "the model failed on this soft prompt"
        for prompt, count in step.fills:
            done = prompt.num_computed + count == prompt.ref.num_virtual_tokens
            if done or prompt.ref.sha256 in result.fill_errors:
                self._filling.pop(prompt.ref.sha256, None)
        return result

    def prepare_to_read(self) -> None:
        """Keep torch in the calling thread: beside a running step a second team of threads would wait long for its
        turn, and hold up the step."""
        torch.set_num_threads(1)

    @torch.inference_mode()
    def read_soft_prompt(self, ref: SoftPromptRef) -> StagedSoftPrompt:
        """Read a soft prompt's file, check it and lay it out; safe to call from another thread.

        Raises SoftPromptError."""
        prompt = load(Path(ref.path), self._max_prompt_bytes)
        check_fits(prompt, self._spec)
        if prompt.manifest.kind == "kv":
            return StagedSoftPrompt(blocks=self._kv_cache.stage(prompt.tensors["keys"], prompt.tensors["values"]))
        embeddings = prompt.tensors["embeddings"].to(self._kv_cache.dtype)
        return StagedSoftPrompt(embeddings=embeddings.pin_memory() if self._on_gpu else embeddings)

    @torch.inference_mode()
    def place_soft_prompt(self, resident: ResidentSoftPrompt, staged: StagedSoftPrompt) -> bool:
        """Bring a soft prompt into its blocks; True if it lies there now, False if steps have to compute it.

        Raises OutOfDeviceMemory and DeviceLost."""
        with _shortage_told():
            try:
                if staged.blocks is not None:
                    self._kv_cache.write(resident.blocks, staged.blocks)
                if staged.embeddings is not None:
                    device = self._kv_cache.device
                    self._filling[resident.ref.sha256] = staged.embeddings.to(device, non_blocking=True)
            except Exception as error:
                if not _is_shortage(error):
                    self._check_device()
                raise
        return staged.embeddings is None

    def _run(
        self,
        rows: list[tuple[Sequence, int]],
        fills: list[tuple[ResidentSoftPrompt, int]],
        result: StepResult,
    ) -> None:
        logits = self.forward([_sequence_row(s, count) for s, count in rows] + [self._fill_row(p, c) for p, c in fills])
        sampling, sampled_rows, at = [], [], 0
        for sequence, count in rows:
            wanted = sequence.logit_rows(count)
            if sequence.score_from is not None:
                self._score(sequence, wanted, logits[at : at + len(wanted)], result)
            elif wanted:
                sampling.append(sequence)
                sampled_rows.append(at)
            at += len(wanted)
        if not sampling:
            return
        if len(sampled_rows) < at:
            logits = logits[small_tensor(sampled_rows, logits.device, torch.int64)]
        inputs = [SampleInput(s.params, s.tokens, s.num_prompt, s.length) for s in sampling]
        for sequence, chosen in zip(sampling, sample(logits, inputs), strict=True):
            if chosen.error is not None:
                result.errors[sequence.request_id] = chosen.error
                continue
            result.tokens[sequence.request_id] = chosen.token_id
            if chosen.logprobs is not None:
                result.logprobs[sequence.request_id] = chosen.logprobs

    def _score(self, sequence: Sequence, wanted: range, logits: torch.Tensor, result: StepResult) -> None:
        """Log-probability of the token that follows each wanted position."""
        first = sequence.num_computed - sequence.num_virtual
        following = [sequence.tokens[first + offset + 1] for offset in wanted]
        targets = small_tensor(following, logits.device, torch.int64)
        table = torch.log_softmax(logits.float(), dim=-1)
        scores: list[float] = table.gather(1, targets[:, None])[:, 0].tolist()
        if all(map(math.isfinite, scores)):
            result.scores[sequence.request_id] = scores
        else:
            result.errors[sequence.request_id] = "the model's logits are not finite"

    def forward(self, rows: list[Row]) -> torch.Tensor:
        """Logits of the rows' `logit_rows`, one after another: [R, vocab]."""
        return self._forward(self._build(rows))

    def _check_device(self) -> None:
        """Some errors (an illegal address, a failed assertion in a kernel) leave a process's GPU unusable for good.

        Raises DeviceLost."""
        if self._on_gpu:
            try:
                torch.cuda.synchronize(self._kv_cache.device)
            except RuntimeError as error:
                raise DeviceLost(str(error)) from error

    def _fill_row(self, prompt: ResidentSoftPrompt, count: int) -> Row:
        embeddings = self._filling[prompt.ref.sha256][prompt.num_computed : prompt.num_computed + count]
        return Row(prompt.num_computed, (), prompt.blocks, range(0), embeddings=embeddings)


def _is_shortage(error: Exception) -> bool:
    """Whether the device has no memory left: torch's allocator has a class for it, the driver (a graph, a Triton
    kernel) and cuBLAS only say so."""
    told = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in told)
    )


@contextmanager
def _shortage_told() -> Iterator[None]:
    """Turns what a full device raises into OutOfDeviceMemory."""
    try:
        yield
    except RuntimeError as error:
        if not _is_shortage(error):
            raise
        torch.cuda.empty_cache()
        raise OutOfDeviceMemory from error


def _sequence_row(sequence: Sequence, count: int) -> Row:
    first = sequence.num_computed - sequence.num_virtual
    tokens = sequence.tokens[first : first + count]
    return Row(sequence.num_computed, tokens, sequence.block_table, sequence.logit_rows(count))
