"""CUDA graphs: the kernels of a step, hundreds of them, started by one call."""

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
    """Records what `run` does to the memory it uses; calling the result does it again and returns the same tensor."""

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
    """Records CUDA graphs, which share one pool of memory: only one of them runs at a time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        # One stream for all: cuBLAS keeps tens of megabytes of working memory for every stream that it has met.
        self._stream = torch.cuda.Stream()

    def __call__(self, run: Replay) -> Replay:
        """Raises RuntimeError where `run` waits for the device: found out before recording, which such a failure would
        leave torch in the middle of."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):  # kernels are compiled and libraries set up before anything is recorded
            run()
            with _waiting_refused():
                run()
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            output = run()
        graph.replay()  # what its first launch needs is taken now, not amid requests

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

    Logits that nobody asked for are cut off. What a graph returns is overwritten by the next replay of any.
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

    def capture_all(self) -> str:
        """Capture every shape, and say what came of it."""
        shapes = len(self._batches.shapes)
        for done, shape in enumerate(self.capture(), start=1):
            if done % 8 == 0:
                logger.info("captured %d of %d CUDA graphs, down to %d tokens", done, shapes, shape.tokens)
        return f"{len(self._captured)} of {shapes} batch shapes, the largest of {self._batches.shapes[0].tokens} tokens"

    @torch.inference_mode()
    def capture(self) -> Iterator[BatchShape]:
        """Capture one shape after another, the largest first (the smaller reuse its memory); yields each when done.

        A model whose code cannot be captured, because it looks at the device in between, runs without graphs.
        """
        shapes = self._batches.shapes
        # Logits go to one buffer: returned by the graphs themselves, they would be memory that no two graphs share.
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
        """Padding rows in memory of their own, with a block table as wide as any step's."""
        batch = self._batches.empty(shape)
        table = batch.attention.block_table
        wide = table.new_zeros((shape.tokens, self._max_blocks))
        wide[:, : table.shape[1]] = table
        return replace(batch, attention=replace(batch.attention, block_table=wide))


def _run(forward: Forward, static: RaggedBatch, logits: torch.Tensor) -> torch.Tensor:
    return logits.copy_(forward(static))


def _tensors(batch: RaggedBatch) -> list[torch.Tensor]:
    """What differs between two steps of one shape."""
    attention, plan = batch.attention, batch.attention.plan
    tensors = [batch.token_ids, batch.positions, batch.logit_rows]
    tensors += [attention.slot_mapping, attention.context_len, attention.block_table]
    if plan is not None:
        tensors += [plan.narrow, plan.merges]
    if batch.shape is not None and not batch.shape.is_decoding:
        tensors += [attention.query_start, *([plan.wide] if plan is not None else [])]
    return tensors
