"""Stands for CUDA graphs where there is no CUDA."""

from __future__ import annotations

from softbatch.scheduler.model.cuda.graphs import Replay


class CallAgain:
    """A capturer without CUDA: replays by calling the function, which knows nothing but its static buffers."""

    def __init__(self) -> None:
        self.captured = 0

    def __call__(self, run: Replay) -> Replay:
        self.captured += 1
        return run
