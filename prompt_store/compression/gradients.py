"""The gradients of training batches, two of them under way at once where that is faster."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from prompt_store.compression.decoder import Decoder
from prompt_store.compression.objectives import objective_from_hidden
from prompt_store.compression.pairs import Pair, answer_states, collate
from prompt_store.compression.student import Student

# Rotary embeddings of these types change a buffer in the forward pass, which two threads cannot share.
_CHANGING_ROPE = ("dynamic", "longrope")


@dataclass(frozen=True)
class Gradient:
    """The mean loss of a batch, and its gradient in every trainable tensor of σ."""

    loss: float
    parts: dict[str, Tensor]


def workers_for(decoder: Decoder, threads: int) -> int:
    """How many batches are computed at once.

    Much of a step on a CPU is no matrix product and runs on one thread: on two cores two batches, a thread each, make
    1.6 (`kv`) to 1.8 (`embeddings`) times as many steps as one after the other. Not measured on more cores.
    """
    rope = getattr(getattr(decoder.body, "rotary_emb", None), "rope_type", "default")
    return 2 if decoder.device.type == "cpu" and threads > 1 and rope not in _CHANGING_ROPE else 1


class GradientQueue:
    """Gives gradients back in the order in which batches were added, whichever is done first. Each is taken at the σ
    that it was added with, so that what comes out depends on that order alone.

    Owns its threads, which share those of torch. One worker has none: it computes what is taken when it is taken.
    """

    def __init__(self, pairs: Sequence[Pair], teacher: Sequence[Tensor] | None, alpha: float, workers: int) -> None:
        self._pairs, self._teacher, self._alpha = pairs, teacher, alpha
        self._pending: deque[tuple[Student, Callable[[], Gradient]]] = deque()
        self._threads = torch.get_num_threads()
        each = max(1, self._threads // workers)
        self._pool = ThreadPoolExecutor(workers, "gradient", torch.set_num_threads, (each,)) if workers > 1 else None

    def __len__(self) -> int:
        return len(self._pending)

    @property
    def oldest(self) -> Student | None:
        """The σ of the batch that is taken next; None when there is none."""
        return self._pending[0][0] if self._pending else None

    def add(self, student: Student, indices: Sequence[int]) -> None:
        """`student` must not change any more."""
        if self._pool is None:
            self._pending.append((student, lambda: self._gradient(student, indices)))
        else:
            self._pending.append((student, self._pool.submit(self._gradient, student, indices).result))

    def take(self) -> Gradient:
        """The oldest one's, once it is there; raises what computing it raised."""
        return self._pending.popleft()[1]()

    def close(self) -> None:
        """Drop what nobody took; waits for the batches that are being computed."""
        self._pending.clear()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            # What a worker sets is also what threads get that use torch for the first time later on.
            torch.set_num_threads(self._threads)

    def _gradient(self, student: Student, indices: Sequence[int]) -> Gradient:
        decoder = student.decoder
        batch = collate(self._pairs, indices, decoder.device)
        targets = torch.cat([self._teacher[index] for index in indices]) if self._teacher is not None else None
        states = answer_states(decoder, student.prefix(), batch)
        loss = objective_from_hidden(states, targets, batch.gold, decoder.head, self._alpha)
        found = torch.autograd.grad(loss, list(student.trainable.values()))
        return Gradient(float(loss.detach()), dict(zip(student.trainable, found, strict=True)))
