"""CUDA graphs: the kernels of a decoding step, hundreds of them, started by one call."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import torch

from scheduler.model.batch import RaggedBatch
from scheduler.model.cuda.buckets import BucketedBatches
from scheduler.model.forward import Forward

logger = logging.getLogger(__name__)
_WARM_UPS = 2
Replay = Callable[[], torch.Tensor]


class Capturer(Protocol):
    """Records what `run` does to the memory it uses; calling the result does it again and returns the same tensor."""

    def __call__(self, run: Replay) -> Replay: ...


class CudaCapturer:
    """Records CUDA graphs, which share one pool of memory: only one of them runs at a time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Replay) -> Replay:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # kernels are compiled and libraries set up before anything is recorded
            for _ in range(_WARM_UPS):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            output = run()

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
    """`Forward` that replays a graph where every row decodes, and calls `forward` for everything else.

    The logits of padding rows are cut off. What a graph returns is overwritten by its next replay.
    """

    def __init__(self, forward: Forward, batches: BucketedBatches, max_blocks: int, capturer: Capturer) -> None:
        self._forward = forward
        self._batches = batches
        self._max_blocks = max_blocks
        self._capturer = capturer
        self._captured: dict[int, _Captured] = {}

    def __call__(self, batch: RaggedBatch) -> torch.Tensor:
        if batch.padded_from is None:
            return self._forward(batch)
        captured = self._captured.get(len(batch.token_ids))
        if captured is None or batch.attention.block_table.shape[1] > self._max_blocks:
            return self._forward(batch)[: batch.padded_from]
        return captured(batch)[: batch.padded_from]

    def capture_all(self) -> str:
        """Capture every size, and say what came of it."""
        sizes = len(self._batches.sizes)
        for done, size in enumerate(self.capture(), start=1):
            if done % 8 == 0:
                logger.info("captured CUDA graphs for %d of %d batch sizes, down to %d", done, sizes, size)
        return f"{len(self._captured)} of {sizes} batch sizes, the largest {self._batches.sizes[-1]}"

    @torch.inference_mode()
    def capture(self) -> Iterator[int]:
        """Capture one size after another, the largest first (the smaller reuse its memory); yields each when done.

        A model whose code cannot be captured, because it looks at the device in between, runs without graphs.
        """
        for size in sorted(self._batches.sizes, reverse=True):
            static = self._static(size)
            try:
                replay = self._capturer(partial(self._forward, static))
            except RuntimeError as error:
                logger.warning("decoding runs without CUDA graphs from here down: %s", str(error).splitlines()[0])
                return
            self._captured[size] = _Captured(static, replay)
            yield size

    def _static(self, size: int) -> RaggedBatch:
        """Padding rows in memory of their own, with a block table as wide as any step's."""
        batch = self._batches.empty(size)
        table = batch.attention.block_table
        wide = table.new_zeros((size, self._max_blocks))
        wide[:, : table.shape[1]] = table
        return replace(batch, attention=replace(batch.attention, block_table=wide))


def _tensors(batch: RaggedBatch) -> list[torch.Tensor]:
    """What differs between two decoding steps of one size."""
    attention = batch.attention
    tensors = [batch.token_ids, batch.positions, attention.slot_mapping, attention.context_len, attention.block_table]
    if attention.plan is not None:
        tensors += [attention.plan.narrow, attention.plan.merges]
    return tensors
