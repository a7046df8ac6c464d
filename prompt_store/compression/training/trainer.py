"""The training loop: Adam on σ under a step count or a time budget, checkpoints, resume, progress, stop."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from softbatch.prompt_store.atomic_files import replace_file
from softbatch.prompt_store.compression.compression_settings import weight_of_nll
from softbatch.prompt_store.compression.frozen.pairs import answer_states, batches_from, collate
from softbatch.prompt_store.compression.frozen.rendering import TrainingPair
from softbatch.prompt_store.compression.progress import Progress
from softbatch.prompt_store.compression.training.schedule import learning_rate_factor
from softbatch.prompt_store.compression.training.student import Student

# Adam's step for values and embeddings, measured on the default model. Keys are larger numbers: they move faster.
DEFAULT_LEARNING_RATE = {"kv": 4e-3, "embeddings": 1e-2}
KEY_FACTOR = 4.0


@dataclass(frozen=True)
class TrainingSettings:
    """How σ is trained. Exactly one of `steps` and `seconds` bounds the run.

    With `seconds` the schedule follows the clock, so that the cosine has come down when the budget ends,
    whatever a step costs; with `steps` the run is a function of the seed alone. `learning_rate` None: the
    kind's default.
    """

    objective: str = "kl"
    alpha: float = 0.5
    steps: int | None = None
    seconds: float | None = None
    batch_size: int = 4
    learning_rate: float | None = None
    warmup: float = 0.03
    final_rate: float = 0.02
    seed: int = 0
    checkpoint_seconds: float = 30.0

    def __post_init__(self) -> None:
        weight_of_nll(self.objective, self.alpha)
        if (self.steps is None) == (self.seconds is None):
            raise ValueError("give either steps or seconds")
        if self.steps is not None and not 1 <= self.steps <= 1_000_000:
            raise ValueError(f"steps must lie between 1 and 1000000, got {self.steps}")
        if self.seconds is not None and not 0 < self.seconds <= 30 * 86400:
            raise ValueError(f"seconds must lie between 0 and {30 * 86400}, got {self.seconds}")
        if not 1 <= self.batch_size <= 1024:
            raise ValueError(f"batch_size must lie between 1 and 1024, got {self.batch_size}")
        if self.learning_rate is not None and not 0 < self.learning_rate <= 10:
            raise ValueError(f"learning_rate must lie between 0 and 10, got {self.learning_rate}")


@dataclass
class TrainingState:
    """What a checkpoint holds beside the tensors. `curve` has (step, seconds, loss) of every step."""

    step: int = 0
    elapsed: float = 0.0
    curve: list[tuple[int, float, float]] = field(default_factory=list)


@dataclass(frozen=True)
class TrainingResult:
    steps: int
    seconds: float
    curve: list[tuple[int, float, float]]
    stopped: bool


class Trainer:
    """Trains one student on (pairs, teacher states). Owns the optimiser state and the checkpoint
    directory."""

    def __init__(
        self,
        student: Student,
        pairs: Sequence[TrainingPair],
        teacher: Sequence[Tensor] | None,
        settings: TrainingSettings,
        checkpoint: Path | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not pairs:
            raise ValueError("there are no training pairs")
        self.student, self.pairs, self.teacher = student, pairs, teacher
        self.settings, self.checkpoint, self.clock = settings, checkpoint, clock
        self.alpha = weight_of_nll(settings.objective, settings.alpha)
        if teacher is None and self.alpha < 1:
            raise ValueError(f"objective {settings.objective} needs the teacher's states")
        self.rate = settings.learning_rate or DEFAULT_LEARNING_RATE[student.kind]
        groups = [
            {"params": [part], "factor": KEY_FACTOR if name == "keys" else 1.0}
            for name, part in student.trainable.items()
        ]
        self.optimiser = torch.optim.Adam(groups, lr=self.rate, betas=(0.9, 0.95))
        self.state = TrainingState()
        self.budget = settings.seconds

    def allow(self, seconds: float) -> None:
        """Set the time budget anew, for a run whose settings have one: training in all, what is spent included."""
        self.budget = seconds

    def run(
        self,
        on_progress: Callable[[Progress], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> TrainingResult:
        """Train to the end of the budget, from the checkpoint where there is one that fits these settings."""
        settings, state = self.settings, self.state
        started = self.clock() - state.elapsed
        saved = self.clock()
        stopped = False
        for indices in batches_from(self.pairs, settings.batch_size, settings.seed, state.step):
            state.elapsed = self.clock() - started
            if self._is_over() or (stopped := should_stop is not None and should_stop()):
                break
            loss = self._step(indices)
            state.step += 1
            state.elapsed = self.clock() - started
            state.curve.append((state.step, round(state.elapsed, 3), loss))
            if not math.isfinite(loss):
                raise FloatingPointError(f"the loss is not finite at step {state.step}; lower the learning rate")
            if on_progress is not None:
                on_progress(self._progress(loss))
            if self.checkpoint is not None and self.clock() - saved >= settings.checkpoint_seconds:
                self.save()
                saved = self.clock()
        if self.checkpoint is not None:
            self.save()
        return TrainingResult(state.step, state.elapsed, list(state.curve), stopped)

    @property
    def fraction(self) -> float:
        """How much of the training is done."""
        if self.settings.steps is not None:
            return self.state.step / self.settings.steps
        assert self.budget is not None
        return self.state.elapsed / self.budget

    def _is_over(self) -> bool:
        if self.settings.steps is not None:
            return self.state.step >= self.settings.steps
        assert self.budget is not None
        per_step = self.state.elapsed / self.state.step if self.state.step else 0.0
        return self.state.elapsed + per_step > self.budget

    def _step(self, indices: list[int]) -> float:
        factor = learning_rate_factor(self.fraction, self.settings.warmup, self.settings.final_rate)
        for group in self.optimiser.param_groups:
            group["lr"] = self.rate * group["factor"] * factor
        decoder = self.student.decoder
        batch = collate(self.pairs, indices, decoder.device)
        targets = torch.cat([self.teacher[index] for index in indices]) if self.teacher is not None else None
        states = answer_states(decoder, self.student.prefix(), batch)
        loss = decoder.objective(states, targets, batch.gold, self.alpha)
        self.optimiser.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        self.optimiser.step()
        return float(loss.detach())

    def _progress(self, loss: float) -> Progress:
        state, settings = self.state, self.settings
        per_step = state.elapsed / state.step
        if settings.steps is not None:
            total, left = settings.steps, (settings.steps - state.step) * per_step
        else:
            assert self.budget is not None
            left = max(0.0, self.budget - state.elapsed)
            total = state.step + int(left / per_step) if per_step > 0 else state.step
        return Progress("training", state.step, total, loss, left)

    def identity(self) -> dict[str, Any]:
        """What must be the same for a checkpoint to be this run's."""
        shapes = {name: list(part.shape) for name, part in self.student.trainable.items()}
        return {"settings": asdict(self.settings), "pairs": len(self.pairs), "shapes": shapes}

    def save(self) -> None:
        """Write the checkpoint; each file is replaced whole, and the JSON names the tensors it belongs to."""
        assert self.checkpoint is not None
        self.checkpoint.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, Tensor] = {}
        for name, part in self.student.trainable.items():
            tensors[f"sigma.{name}"] = part.detach().contiguous()
            for key, value in self.optimiser.state.get(part, {}).items():
                tensors[f"adam.{name}.{key}"] = torch.as_tensor(value).contiguous()
        for name, part in self.student.sink.items():
            tensors[f"sink.{name}"] = part.contiguous()
        target = f"sigma-{self.state.step}.safetensors"
        replace_file(self.checkpoint / target, lambda path: save_file(tensors, path))
        record = {"tensors": target, **self.identity(), **asdict(self.state)}
        replace_file(self.checkpoint / "state.json", lambda path: path.write_text(json.dumps(record)))
        for old in self.checkpoint.glob("sigma-*.safetensors"):
            if old.name != target:
                old.unlink(missing_ok=True)

    def resume(self) -> bool:
        """Load the checkpoint. False when there is none; ValueError when it is another run's or cannot be
        read."""
        if self.checkpoint is None or not (self.checkpoint / "state.json").exists():
            return False
        try:
            record = json.loads((self.checkpoint / "state.json").read_text())
            tensors = load_file(self.checkpoint / Path(record["tensors"]).name, device=str(self.student.decoder.device))
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise ValueError(f"the checkpoint in {self.checkpoint.name} cannot be read: {error}") from None
        for key, value in self.identity().items():
            if record.get(key) != value:
                raise ValueError(f"the checkpoint in {self.checkpoint.name} was made with other {key}")
        with torch.no_grad():
            for name, part in self.student.trainable.items():
                part.copy_(tensors[f"sigma.{name}"])
                prefix = f"adam.{name}."
                found = {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
                if found:
                    self.optimiser.state[part] = {**found, "step": found["step"].cpu()}
            for name, part in self.student.sink.items():
                part.copy_(tensors[f"sink.{name}"])
        curve = [(int(step), float(seconds), float(loss)) for step, seconds, loss in record["curve"]]
        self.state = TrainingState(int(record["step"]), float(record["elapsed"]), curve)
        return True
