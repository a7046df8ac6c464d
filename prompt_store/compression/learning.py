"""From answered questions to σ: the teacher's states, matching, training, each within its share of the budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from softbatch.prompt_store.compression.compression_settings import CompressionSettings, MatchingSettings
from softbatch.prompt_store.compression.data.examples import Example
from softbatch.prompt_store.compression.data.selection import spread_first, surplus_recitations
from softbatch.prompt_store.compression.frozen.context import Context
from softbatch.prompt_store.compression.frozen.prefix import Prefix
from softbatch.prompt_store.compression.frozen.rendering import TrainingPair
from softbatch.prompt_store.compression.pace import Pace, Stopped
from softbatch.prompt_store.compression.progress import Progress
from softbatch.prompt_store.compression.training.hidden_states import (
    Observed,
    TeacherOutputs,
    hidden_states_of,
    without,
)
from softbatch.prompt_store.compression.training.matching import fit, selected
from softbatch.prompt_store.compression.training.student import Student
from softbatch.prompt_store.compression.training.trainer import Trainer, TrainingResult, TrainingSettings
from softbatch.prompt_store.compression.training.visibility import with_passages
from softbatch.prompt_store.compression.work_directory import load_states, save_states

TEACHER_SHARE = 0.14
MATCHING_SHARE = 0.18
PREVIEW_SHARE = 0.05
OBSERVED_PAIRS = 160
FEWEST_OBSERVED = 16
PREVIEW_PAIRS = 96
PREVIEW_STEPS = 100
# Seconds; with a smaller budget less is observed.
SMALL_BUDGET = 300.0
# Pairs that the teacher answers at once. Training takes its own, smaller number: more steps are worth more to it.
TEACHER_BATCH = 8
MATCHING_FILE = "matching.safetensors"
# Of training, when the held-out loss is looked at to see whether it still falls.
LOOK_AT = 0.75


@dataclass(frozen=True)
class Learned:
    """`loss_before`: the held-out loss when three quarters of training were done, None when nobody looked."""

    student: Student
    pairs: list[TrainingPair]
    result: TrainingResult
    loss_before: float | None


class Learning:
    """Owns what lies in the work directory between the gold answers and σ."""

    def __init__(self, context: Context, settings: CompressionSettings, directory: Path, pace: Pace) -> None:
        self.context, self.settings, self.directory, self.pace = context, settings, directory, pace

    def learn(
        self,
        examples: Sequence[Example],
        reserve: float,
        held_out_loss: Callable[[Prefix], float],
        look_seconds: float,
    ) -> Learned:
        """`reserve` seconds are kept for what follows; one look at `held_out_loss` takes `look_seconds`. Raises
        Stopped."""
        if self.settings.matching_steps:
            examples = spread_first(examples, self._observed)
        pairs, teacher = self._teacher_outputs([self.context.pair(example) for example in examples])
        student = self._matched(teacher, reserve)
        dropped = surplus_recitations(examples)
        asked, teacher = without(pairs, teacher, dropped)
        pairs = asked
        if self.settings.recall:
            left = [example for index, example in enumerate(examples) if index not in set(dropped)]
            pairs, teacher = with_passages(
                asked, teacher, left, self.context.tokenized, self.settings.recall, self.settings.virtual_tokens
            )
        trainer = self._trainer(student, pairs, teacher)
        if self.pace.budget is not None:
            trainer.allow(trainer.state.elapsed + max(1.0, self.pace.left - reserve))
        # A resumed run that begins behind the look has no loss of that time; a later one would say something else.
        may_look, looked = trainer.fraction < LOOK_AT, list[float]()

        def on_step(progress: Progress) -> None:
            self.pace.pass_on(progress)
            if may_look and trainer.fraction >= LOOK_AT and not looked and self._has_time(look_seconds, reserve):
                looked.append(held_out_loss(student.fixed_prefix()))

        result = trainer.run(on_step, self.pace.is_stopped)
        if result.stopped:
            raise Stopped
        return Learned(student, asked, result, looked[0] if looked else None)

    def _has_time(self, seconds: float, reserve: float) -> bool:
        return self.pace.budget is None or seconds < 0.25 * (self.pace.left - reserve)

    @property
    def _observed(self) -> int:
        budget = self.pace.budget
        haste = 1.0 if budget is None else min(1.0, budget / SMALL_BUDGET)
        return max(FEWEST_OBSERVED, round(OBSERVED_PAIRS * haste))

    def _teacher_outputs(self, pairs: Sequence[TrainingPair]) -> tuple[list[TrainingPair], TeacherOutputs]:
        """The teacher's states, on as many pairs as the time share allows: of the observed ones first, then of the
        others in their order. Once training has begun they come from their file: matching is over."""
        settings, pace, began = self.settings, self.pace, self.pace.clock()
        kept = self.directory / "teacher.safetensors"
        decoder = self.context.decoder
        states = [state.to(decoder.device) for state in load_states(kept)] if kept.exists() else []
        if (self.directory / "checkpoint" / "state.json").exists():
            return list(pairs[: len(states)]), TeacherOutputs(states, [])
        watched = min(self._observed, len(pairs)) if settings.matching_steps else 0
        ends = [*range(watched, len(pairs), TEACHER_BATCH * (16 if pace.budget is None else 4)), len(pairs)]
        observed: list[Observed] = []
        for start, end in pairwise(dict.fromkeys([0, *ends])):
            # What this part will take, as the parts before it did.
            coming = (pace.clock() - began) / start * end if start else 0.0
            late = pace.budget is not None and coming > TEACHER_SHARE * pace.budget
            if end > watched and (end <= len(states) or (start and late)):
                continue
            part = [pair.of_teacher for pair in pairs[start:end]]
            watch = len(part) if end <= watched else 0
            found = hidden_states_of(decoder, self.context.full, part, TEACHER_BATCH, watch, settings.virtual_tokens)
            observed += found.observed
            if end > len(states):
                states += found.states
                save_states(states, kept)
            pace.tell("teacher", end, len(pairs), began)
            pace.check_stop()
        return list(pairs[: len(states)]), TeacherOutputs(states, observed)

    def _matched(self, teacher: TeacherOutputs, reserve: float) -> Student:
        """Where training starts."""
        settings, pace, began = self.settings, self.pace, self.pace.clock()
        student = self._start(teacher.observed)
        if not teacher.observed:
            return student
        steps, seconds = settings.matching_steps, None
        if pace.budget is not None:
            share = MATCHING_SHARE * pace.budget - (pace.clock() - began)
            seconds = max(0.01, min(share, (pace.left - reserve) / 2))

        def on_step(step: int, error: float) -> None:
            if step % 10 == 0 or step == steps:
                pace.tell("matching", step, steps, began, error)
                pace.check_stop()

        matching = MatchingSettings(steps, seconds)
        fit(student, teacher.observed, matching, pace.clock, on_step, self.directory / MATCHING_FILE)
        return student

    def _start(self, observed: Sequence[Observed]) -> Student:
        """Where matching starts."""
        context, decoder, length = self.context, self.context.decoder, self.settings.virtual_tokens
        if self.settings.kind == "embeddings":
            return Student(decoder, "embeddings", {"embeddings": context.untrained_embeddings(length)})
        if observed:
            return Student.from_prefix(decoder, selected(decoder, context.full, observed, length))
        return Student.from_prefix(decoder, context.untrained_kv(length))

    @property
    def preview_pairs(self) -> int:
        """How many answered questions a preview is made of."""
        return min(PREVIEW_PAIRS, self._observed)

    def preview(self, examples: Sequence[Example]) -> Student:
        """σ matched in haste, and to a few pairs alone. What comes behind it begins anew. Raises Stopped."""
        settings, pace, decoder = self.settings, self.pace, self.context.decoder
        shown_all = [example for example in examples if not example.passage] or examples
        pairs = [self.context.pair(example) for example in shown_all]
        pace.tell("preview", 0, PREVIEW_STEPS)
        observed = hidden_states_of(
            decoder, self.context.full, pairs, TEACHER_BATCH, len(pairs), settings.virtual_tokens
        ).observed
        student, began = self._start(observed), pace.clock()

        def on_step(step: int, error: float) -> None:
            if step % 10 == 0:
                pace.tell("preview", step, PREVIEW_STEPS, began, error)
                pace.check_stop()

        seconds = None if pace.budget is None else PREVIEW_SHARE * pace.budget
        steps = min(PREVIEW_STEPS, settings.matching_steps)
        fit(student, observed, MatchingSettings(steps, seconds), pace.clock, on_step)
        return student

    def _trainer(self, student: Student, pairs: Sequence[TrainingPair], teacher: TeacherOutputs) -> Trainer:
        settings = self.settings
        training = TrainingSettings(
            objective=settings.objective,
            alpha=settings.alpha,
            steps=settings.steps,
            seconds=settings.seconds,
            batch_size=settings.batch_size,
            learning_rate=settings.learning_rate,
            seed=settings.seed,
        )
        trainer = Trainer(student, pairs, teacher.states, training, self.directory / "checkpoint", self.pace.clock)
        if not trainer.resume():
            trainer.save()
        (self.directory / MATCHING_FILE).unlink(missing_ok=True)
        return trainer
