"""The gradients of training batches, several of them under way at once."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from prompt_store.compression.objectives import objective_from_hidden
from prompt_store.compression.pairs import Pair, answer_states, collate
from prompt_store.compression.student import Student


@dataclass(frozen=True)
class Gradient:
    """The mean loss of a batch, and its gradient in every trainable tensor of σ."""

    loss: float
    parts: dict[str, Tensor]


def depth_for(device: torch.device, threads: int) -> int:
    """How many batches are best under way at once.

    Much of a step on a CPU is no matrix product and runs on one thread: on two cores two batches, a thread each, make
    1.6 (`kv`) to 1.8 (`embeddings`) times as many steps as one after the other. More have not been tried.
    """
    return 2 if device.type == "cpu" and threads > 1 else 1


class GradientQueue:
    """Gives gradients back in the order in which batches were added, whichever thread is done first. Each is taken at
    the σ that it was added with, so that what comes out depends on that order alone. Owns its threads."""

    def __init__(self, pairs: Sequence[Pair], teacher: Sequence[Tensor] | None, alpha: float, depth: int) -> None:
        self._pairs, self._teacher, self._alpha = pairs, teacher, alpha
        self._pending: deque[tuple[Student, Future[Gradient]]] = deque()
        threads = max(1, torch.get_num_threads() // depth)
        self._pool = ThreadPoolExecutor(depth, "gradient", torch.set_num_threads, (threads,))

    def __len__(self) -> int:
        return len(self._pending)

    @property
    def students(self) -> list[Student]:
        """The σ of every batch under way, oldest first."""
        return [student for student, _ in self._pending]

    def add(self, student: Student, indices: Sequence[int]) -> None:
        """`student` must not change any more."""
        self._pending.append((student, self._pool.submit(self._gradient, student, indices)))

    def take(self) -> Gradient:
        """Wait for the oldest one; raises what computing it raised."""
        return self._pending.popleft()[1].result()

    def close(self) -> None:
        """Drop what nobody took; waits for the batches under way."""
        self._pool.shutdown(cancel_futures=True)
        self._pending.clear()

    def _gradient(self, student: Student, indices: Sequence[int]) -> Gradient:
        decoder = student.decoder
        batch = collate(self._pairs, indices, decoder.device)
        targets = torch.cat([self._teacher[index] for index in indices]) if self._teacher is not None else None
        states = answer_states(decoder, student.prefix(), batch)
        loss = objective_from_hidden(states, targets, batch.gold, decoder.head, self._alpha)
        found = torch.autograd.grad(loss, list(student.trainable.values()))
        return Gradient(float(loss.detach()), dict(zip(student.trainable, found, strict=True)))
