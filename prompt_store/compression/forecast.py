"""What a run will take here, from small steps of its own work on this context, model and machine."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from softbatch.prompt_store.atomic_files import replace_file
from softbatch.prompt_store.compression.compression_settings import CompressionSettings
from softbatch.prompt_store.compression.evaluation.fidelity import position_table
from softbatch.prompt_store.compression.evaluation.free_answers import WITH_SIGMA, WITHOUT_SIGMA
from softbatch.prompt_store.compression.evaluation.verdict import FEW_STEPS
from softbatch.prompt_store.compression.frozen.context import Context
from softbatch.prompt_store.compression.frozen.pairs import answer_states, collate
from softbatch.prompt_store.compression.frozen.rendering import TrainingPair
from softbatch.prompt_store.compression.training.hidden_states import hidden_states_of
from softbatch.prompt_store.compression.training.student import Student

MEASURING_SHARE = 0.3  # of what is left, for σ and its baselines
LEARNING_SHARE = 0.8  # of the rest, without matching
CANDIDATES = 6  # σ and five baselines
ANSWERING = len(WITH_SIGMA) + len(WITHOUT_SIGMA)
OFF_TOPIC = 24  # answers that the questions off the topic are worth, with their references
SIZES = (1.0, 0.75, 0.5, 0.375, 0.25, 0.125)
FEWEST = 4
ENOUGH_STEPS = 200
PASSES = 2  # of training over its pairs


@dataclass(frozen=True)
class Speeds:
    """Seconds: of an answer, of a pair behind the full context and behind σ with its scores, of a training step, and of
    opening the engine once more, for σ's own answers."""

    gold: float
    full: float
    scored: float
    step: float
    engine: float = 0.0


@dataclass(frozen=True)
class Forecast:
    """How much is done of what, the seconds that each phase is expected to take, and the steps that remain."""

    held_out: int
    free_answers: int
    graded: int
    training_pairs: int
    steps: int
    seconds: dict[str, float]
    minutes_needed: float

    @property
    def is_too_short(self) -> bool:
        return self.steps < FEW_STEPS

    def warning(self, minutes: float) -> str:
        """What is said before the work when the budget is too short for it."""
        before = sum(seconds for phase, seconds in self.seconds.items() if phase not in ("training", "matching"))
        return (
            f"{minutes:g} minutes are short for this context, model and machine: about {before:.0f} s go into opening"
            f" the model, answers and measuring, which leaves {_steps(self.steps)}; "
            f"{ENOUGH_STEPS} of them would take --minutes {self.minutes_needed:g}"
        )


def _steps(count: int) -> str:
    return f"time for some {count} training steps" if count > 1 else "no time for training"


@torch.no_grad()
def measure_speeds(
    context: Context,
    pairs: Sequence[TrainingPair],
    settings: CompressionSettings,
    gold: float,
    clock: Callable[[], float],
    engine: float = 0.0,
) -> Speeds:
    """From a few answered `pairs`; `gold` seconds went into each of their answers, and `engine` into opening what gave
    them."""
    decoder, count = context.decoder, len(pairs)

    def seconds(work: Callable[[], object]) -> float:
        decoder.wait()
        began = clock()
        work()
        decoder.wait()
        return clock() - began

    prefix = context.untrained_kv(settings.virtual_tokens)
    found: list[list[Tensor]] = []
    full = seconds(lambda: found.append(hidden_states_of(decoder, context.full, pairs).states)) / count
    groups = [prefix] * len(context.full)

    def score() -> None:
        position_table(decoder, hidden_states_of(decoder, groups, pairs).states, found[0], pairs)

    student = Student.from_prefix(decoder, prefix)
    batch = list(range(min(count, settings.batch_size)))

    def step() -> None:
        with torch.enable_grad():
            made = collate(pairs, batch, decoder.device)
            states = answer_states(decoder, student.prefix(), made)
            torch.autograd.backward(decoder.objective(states, torch.cat(found[0])[: len(states)], made.gold, 0.0))

    step()
    return Speeds(
        gold=gold,
        full=full,
        scored=seconds(score) / count,
        step=seconds(step) * settings.batch_size / len(batch),
        engine=engine,
    )


def forecast(
    speeds: Speeds,
    settings: CompressionSettings,
    spent: float,
    left: float,
    held_out: int,
    training: int,
    graded: int = 0,
) -> Forecast:
    """A plan for `left` seconds of budget behind `spent` ones; of `held_out`, `training` and `graded` questions, whose
    answers are said to be right or wrong, it takes as many as there is time for."""

    def measuring(share: float) -> tuple[int, int, int, float]:
        questions = max(FEWEST, round(share * held_out))
        free = max(min(1, settings.free_answers), round(share * min(settings.free_answers, held_out)))
        right = min(graded, max(FEWEST, round(share * graded)))
        seconds = CANDIDATES * questions * speeds.scored + ANSWERING * (free + right) * speeds.gold + speeds.engine
        seconds += questions * (speeds.gold + 2 * speeds.full)
        return questions, free, right, seconds + OFF_TOPIC * speeds.scored

    sizes = [measuring(share) for share in SIZES]
    questions, free, right, seconds = next((size for size in sizes if size[3] <= MEASURING_SHARE * left), sizes[-1])
    learning = max(0.0, left - seconds)
    per_pair = speeds.gold + speeds.full
    pairs_per_step = settings.batch_size / PASSES
    per_step = speeds.step + pairs_per_step * per_pair
    pairs = min(training, max(4 * FEWEST, int(LEARNING_SHARE * learning / per_step * pairs_per_step)))
    training_seconds = LEARNING_SHARE * learning - pairs * per_pair
    steps = max(0, int(training_seconds / speeds.step))
    enough = min(training, ENOUGH_STEPS * pairs_per_step) * per_pair + ENOUGH_STEPS * speeds.step
    needed = spent + max(sizes[-1][3], min(sizes[0][3], MEASURING_SHARE * enough)) + enough / LEARNING_SHARE
    return Forecast(
        questions,
        free,
        right,
        pairs,
        steps,
        {
            "opening": round(spent, 1),
            "gold": round(pairs * speeds.gold + questions * speeds.gold, 1),
            "teacher": round(pairs * speeds.full, 1),
            "matching": round((1 - LEARNING_SHARE) * learning, 1),
            "training": round(max(0.0, training_seconds), 1),
            "evaluation": round(seconds - questions * speeds.gold, 1),
        },
        float(math.ceil(needed / 60)),
    )


def save_forecast(found: Forecast, path: Path) -> None:
    """So that a resumed run measures on the same questions."""
    replace_file(path, lambda target: target.write_text(json.dumps(asdict(found)), encoding="utf-8"))


def load_forecast(path: Path) -> Forecast | None:
    """None where there is none that can be used."""
    try:
        return Forecast(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
