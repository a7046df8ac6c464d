"""CUDA graphs: one call launches all kernels of a step."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import torch

from softbatch.scheduler.model.batch import BatchShape, RaggedBatch
from softbatch.scheduler.model.cuda.buckets import BucketedBatches
from softbatch.scheduler.model.forward import Forward

logger = logging.getLogger(__name__)
Replay = Callable[[], torch.Tensor]


class Capturer(Protocol):
    """Records what `run` does. Calling the result does it again, on the same memory, and returns the same tensor."""

    def __call__(self, run: Replay) -> Replay: ...


@contextmanager
def _waiting_refused() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


class CudaCapturer:
    """Records CUDA graphs. They share one memory pool, because only one of them runs at a time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        # One stream for all graphs, because cuBLAS keeps working memory for every stream it has seen.
        self._stream = torch.cuda.Stream()

    def __call__(self, run: Replay) -> Replay:
        """Raises RuntimeError if `run` waits for the device. That is tested before recording, which torch could not
        end properly otherwise."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):  # compiles kernels and sets up libraries before anything is recorded
            run()
            with _waiting_refused():
                run()
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            output = run()
        graph.replay()  # the first launch allocates, so it happens now and not during a request

        def replay() -> torch.Tensor:
            graph.replay()
            return output

        return replay


@dataclass(frozen=True)
class _Captured:
    batch: RaggedBatch  # the memory that the recorded kernels read
    replay: Replay

    def __call__(self, batch: RaggedBatch) -> torch.Tensor:
        for static, new in zip(_tensors(self.batch), _tensors(batch), strict=True):
            (static[:, : new.shape[1]] if new is batch.attention.block_table else static).copy_(new)
        return self.replay()


class GraphForward:
    """`Forward` that replays a graph for batches of a captured shape, and calls `forward` for everything else.

    Logits of padding rows are cut off. The next replay of any graph overwrites the logits of the last.
    """

    def __init__(self, forward: Forward, batches: BucketedBatches, max_blocks: int, capturer: Capturer) -> None:
        self._forward = forward
        self._batches = batches
        self._max_blocks = max_blocks
        self._capturer = capturer
        self._captured: dict[BatchShape, _Captured] = {}

    def __call__(self, batch: RaggedBatch) -> torch.Tensor:
        captured = self._captured.get(batch.shape) if batch.shape is not None else None
        if captured is None or batch.attention.block_table.shape[1] > self._max_blocks:
            return self._forward(batch)[: batch.num_logits]
        return captured(batch)[: batch.num_logits]

    def hidden_states(self, batch: RaggedBatch) -> torch.Tensor:
        return self._forward.hidden_states(batch)[: batch.num_logits]

    def capture_all(self) -> str:
        """Capture every shape. Returns a line for the log."""
        shapes = len(self._batches.shapes)
        for done, shape in enumerate(self.capture(), start=1):
            if done % 8 == 0:
                logger.info("captured %d of %d CUDA graphs, down to %d tokens", done, shapes, shape.tokens)
        return f"{len(self._captured)} of {shapes} batch shapes, the largest of {self._batches.shapes[0].tokens} tokens"

    @torch.inference_mode()
    def capture(self) -> Iterator[BatchShape]:
        """Capture one shape after another and yield each. The largest comes first, so that others reuse its memory.

        A model whose code waits for the device cannot be captured and runs without graphs.
        """
        shapes = self._batches.shapes
        # All graphs write logits to this buffer. Otherwise each graph would keep memory for logits of its own.
        few = self._forward(self._static(shapes[-1]))
        logits = few.new_empty((max(shape.logits for shape in shapes), few.shape[1]))
        for shape in shapes:
            static = self._static(shape)
            try:
                replay = self._capturer(partial(_run, self._forward, static, logits[: shape.logits]))
            except RuntimeError as error:
                logger.warning("no CUDA graph of %d tokens and below: %s", shape.tokens, str(error).splitlines()[0])
                return
            self._captured[shape] = _Captured(static, replay)
            yield shape

    def _static(self, shape: BatchShape) -> RaggedBatch:
        """A batch of padding rows in memory of its own, with the widest block table that a step can have."""
        batch = self._batches.empty(shape)
        table = batch.attention.block_table
        wide = table.new_zeros((shape.tokens, self._max_blocks))
        wide[:, : table.shape[1]] = table
        return replace(batch, attention=replace(batch.attention, block_table=wide))


def _run(forward: Forward, static: RaggedBatch, logits: torch.Tensor) -> torch.Tensor:
    return logits.copy_(forward(static))


def _tensors(batch: RaggedBatch) -> list[torch.Tensor]:
    """The tensors that differ between two steps of one shape."""
    attention, plan = batch.attention, batch.attention.plan
    tensors = [batch.token_ids, batch.positions, batch.logit_rows]
    tensors += [attention.slot_mapping, attention.context_len, attention.block_table]
    if batch.lengths is not None:
        tensors.append(batch.lengths)
    if plan is not None:
        tensors += [plan.narrow, plan.merges]
    if batch.shape is not None and not batch.shape.is_decoding:
        tensors += [attention.query_start, *([plan.wide] if plan is not None else [])]
    return tensors
