"""From a context to σ and its report: self-study, gold answers, teacher, baselines, matching, training, evaluation.

Every phase leaves its result in the work directory, so that a run that was killed goes on where it was; the time
already spent counts against the budget.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import Tensor

from softbatch.prompt_store.compression.compression_settings import CompressionSettings
from softbatch.prompt_store.compression.data.examples import Example, Generate, load_jsonl, save_jsonl
from softbatch.prompt_store.compression.data.selection import merge, split, spread_first, surplus_recitations, usable
from softbatch.prompt_store.compression.data.self_study import model_questions, question_prompts, template_questions
from softbatch.prompt_store.compression.evaluation.baselines import measure_baselines, with_gold
from softbatch.prompt_store.compression.evaluation.evaluation import (
    Candidate,
    Evaluation,
    Measured,
    load_measured,
    save_measured,
)
from softbatch.prompt_store.compression.evaluation.report import break_even, build_report, thinned, write_report
from softbatch.prompt_store.compression.frozen.context import Context
from softbatch.prompt_store.compression.frozen.frozen_model import Decoder
from softbatch.prompt_store.compression.frozen.pairs import TrainingPair
from softbatch.prompt_store.compression.frozen.prefix import Prefix
from softbatch.prompt_store.compression.frozen.tokenized_context import TokenizedContext
from softbatch.prompt_store.compression.progress import Progress
from softbatch.prompt_store.compression.training.hidden_states import (
    Observed,
    TeacherOutputs,
    hidden_states_of,
    without,
)
from softbatch.prompt_store.compression.training.matching import MatchingSettings, fit, selected
from softbatch.prompt_store.compression.training.student import Student
from softbatch.prompt_store.compression.training.trainer import Trainer, TrainingResult, TrainingSettings
from softbatch.prompt_store.compression.work_directory import JobDirectory, identity_of, load_states, save_states

# Shares of a time budget after which a phase takes what it has and goes on.
HELD_OUT_SHARE = 0.05
GOLD_SHARE = 0.28
BASELINES_SHARE = 0.45
TEACHER_SHARE = 0.14
MATCHING_SHARE = 0.18
OBSERVED_PAIRS = 160
# Seconds; with fewer less is done at a time, and observed.
SMALL_BUDGET = 300.0
# Pairs that the teacher answers at once. Training takes its own, smaller number: more steps are worth more to it.
TEACHER_BATCH = 8
EVALUATION_STEPS = 7
MATCHING_FILE = "matching.safetensors"


class Stopped(Exception):
    """The run was asked to stop; what it has done so far is in its work directory."""


@dataclass(frozen=True)
class Outcome:
    """σ's tensors in float32 as a soft prompt file holds them, the report, and what the manifest wants to know."""

    kind: str
    tensors: dict[str, Tensor]
    report: dict[str, Any]
    context_sha256: str
    context_tokens: int


class Compression:
    """One compression of one context. `generate` answers prompts greedily (see data.examples.Generate): every prompt
    begins with the same context tokens, except that a long context's segments come one after another. `opening` seconds
    of the budget have gone into opening the model.
    """

    def __init__(
        self,
        decoder: Decoder,
        context: TokenizedContext,
        settings: CompressionSettings,
        generate: Generate,
        directory: Path,
        user_examples: Sequence[Example] = (),
        wrong_prefix: Prefix | None = None,
        on_progress: Callable[[Progress], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
        clock: Callable[[], float] = time.monotonic,
        opening: float = 0.0,
    ) -> None:
        self.decoder, self.settings, self.generate = decoder, settings, generate
        self.context = Context(decoder, context)
        self.user_examples, self.wrong_prefix, self.clock = list(user_examples), wrong_prefix, clock
        self.on_progress, self.should_stop = on_progress or (lambda _: None), should_stop or (lambda: False)
        self.opening = opening
        self.budget = None if settings.seconds is None else max(1.0, settings.seconds - opening)
        self.directory = directory
        self.job = JobDirectory(directory, identity_of(settings, context.text, self.user_examples), clock)

    @property
    def _haste(self) -> float:
        """What to shorten first steps by where the budget is smaller than they are made for."""
        return 1.0 if self.budget is None else min(1.0, self.budget / SMALL_BUDGET)

    @property
    def _observed(self) -> int:
        return max(32, round(OBSERVED_PAIRS * self._haste))

    def _is_late(self, share: float) -> bool:
        return self.budget is not None and self.job.elapsed() > share * self.budget

    def _is_stopped(self) -> bool:
        self.job.save()
        return self.should_stop()

    def _check_stop(self) -> None:
        if self._is_stopped():
            raise Stopped

    def _report(self, phase: str, done: int, total: int, began: float, loss: float | None = None) -> None:
        left = (self.clock() - began) / done * (total - done) if done else None
        self.on_progress(Progress(phase, done, total, loss, left))

    def run(self, resume: bool = False) -> Outcome:
        """Raises Stopped; ValueError when asked to resume another run's directory."""
        self.job.open(resume)
        context, settings = self.context, self.settings
        training, held_out = split(self._questions(), settings.held_out, settings.seed)
        if not held_out or not training:
            raise ValueError("context: too few questions can be made of it to train on some and measure on others")
        held_out = self._answer(held_out, "held_out", HELD_OUT_SHARE, 16)
        training = self._answer(training, "train", GOLD_SHARE, max(16, round(128 * self._haste)))
        if not held_out or not training:
            raise ValueError("the model answers none of the questions about this context")
        prefill_seconds = context.prefill_seconds(self.clock)
        evaluation = Evaluation(
            self.decoder,
            context.renderer,
            context.segments,
            context.full,
            held_out,
            settings.max_answer_tokens,
            settings.free_answers,
            self.clock,
        )
        baselines = self._baselines(evaluation)
        if settings.matching_steps:
            training = spread_first(training, self._observed)
        pairs, teacher = self._teacher_outputs([context.pair(example) for example in training])
        student = self._student(teacher)
        pairs, teacher = without(pairs, teacher, surplus_recitations(training))
        # What is still to come is like one baseline, and writing it all down: only that is kept back of the budget.
        reserve = 1.5 * max(measured.seconds for measured in baselines.values()) + 4.0
        result = self._train(student, pairs, teacher, reserve)
        if result.stopped:
            raise Stopped
        self._check_stop()
        began, prefix = self.clock(), student.fixed_prefix()
        sigma = evaluation.measure(Candidate.shared(prefix, len(context.full)))
        self._report("evaluation", EVALUATION_STEPS - 1, EVALUATION_STEPS, began)
        off_topic = evaluation.off_topic(prefix)
        self._report("evaluation", EVALUATION_STEPS, EVALUATION_STEPS, began)
        tensors = {name: tensor.cpu() for name, tensor in student.tensors().items()}
        facts = self._facts(tensors, pairs, result, prefill_seconds)
        report = build_report(evaluation, sigma, baselines, off_topic, facts)
        write_report(report, self.directory)
        return Outcome(settings.kind, tensors, report, context.tokenized.sha256, context.num_tokens)

    def _questions(self) -> list[Example]:
        """All questions, the user's first, without answers of the model yet; the same on every call."""
        path = self.directory / "questions.jsonl"
        if path.exists():
            return load_jsonl(path)
        settings, text = self.settings, self.context.tokenized.text
        count = settings.questions + settings.held_out
        own: list[Example] = []
        if settings.model_questions:
            asked = question_prompts(text, settings.model_questions // 2 + 1, settings.seed)
            examples = [Example(message, None, "model", position, "model") for message, position in asked]
            replies = self.context.ask(examples, 96, self.generate)
            texts = [self.context.renderer.text(reply) for reply in replies]
            own = model_questions(text, [(t, e.position) for t, e in zip(texts, examples, strict=True)])
            own = own[: settings.model_questions]
        templates = template_questions(text, count, settings.seed)
        examples = merge(self.user_examples, own + templates, text, count + len(self.user_examples))
        save_jsonl(self.context.tokenized.placed(examples), path)
        self.on_progress(Progress("self_study", len(examples), len(examples)))
        return load_jsonl(path)  # as a resumed run reads them, positions rounded

    def _answer(self, examples: Sequence[Example], name: str, share: float, size: int) -> list[Example]:
        """The examples with gold answers, as many as the time share allows; kept in `name`.jsonl as they come."""
        path = self.directory / f"{name}.jsonl"
        done = load_jsonl(path) if path.exists() and path.stat().st_size else []
        began = self.clock()
        while len(done) < len(examples):
            self._check_stop()
            if self._is_late(share) and len(done) >= self.settings.batch_size:
                break
            batch = examples[len(done) : len(done) + size]
            for example in with_gold(self.context, batch, self.generate):
                # The file has no empty answers; one that echoes the question is as unusable.
                empty = not (example.output or "").strip()
                done.append(replace(example, output=example.input) if empty else example)
            save_jsonl(done, path)
            self._report("gold", len(done), len(examples), began)
        return [example for example in done if usable(example)]

    def _baselines(self, evaluation: Evaluation) -> dict[str, Measured]:
        kept = load_measured(self.directory / "baselines.json")
        if kept is not None:
            return kept
        began, settings = self.clock(), self.settings
        done: list[str] = []

        def on_done(name: str) -> None:
            done.append(name)
            self._report("evaluation", len(done), EVALUATION_STEPS, began)
            self._check_stop()

        found = measure_baselines(
            evaluation,
            self.context,
            settings.kind,
            settings.virtual_tokens,
            self.wrong_prefix,
            on_done,
            lambda: self._is_late(BASELINES_SHARE),
        )
        save_measured(found, self.directory / "baselines.json")
        return found

    def _teacher_outputs(self, pairs: Sequence[TrainingPair]) -> tuple[list[TrainingPair], TeacherOutputs]:
        """The teacher's states, on as many pairs as the time share allows: of the observed ones first, then of the
        others in their order. Once training has begun they come from their file: matching is over."""
        settings, began, kept = self.settings, self.clock(), self.directory / "teacher.safetensors"
        states = [state.to(self.decoder.device) for state in load_states(kept)] if kept.exists() else []
        if self._is_training:
            return list(pairs[: len(states)]), TeacherOutputs(states, [])
        watched = min(self._observed, len(pairs)) if settings.matching_steps else 0
        ends = [*range(watched, len(pairs), 16 * TEACHER_BATCH), len(pairs)]
        observed: list[Observed] = []
        for start, end in pairwise(dict.fromkeys([0, *ends])):
            late = self.budget is not None and self.clock() - began > TEACHER_SHARE * self.budget
            if end > watched and (end <= len(states) or (start and late)):
                continue
            part = pairs[start:end]
            watch = len(part) if end <= watched else 0
            found = hidden_states_of(
                self.decoder, self.context.full, part, TEACHER_BATCH, watch, settings.virtual_tokens
            )
            observed += found.observed
            if end > len(states):
                states += found.states
                save_states(states, kept)
            self._report("teacher", end, len(pairs), began)
            self._check_stop()
        return list(pairs[: len(states)]), TeacherOutputs(states, observed)

    @property
    def _is_training(self) -> bool:
        return (self.directory / "checkpoint" / "state.json").exists()

    def _student(self, teacher: TeacherOutputs) -> Student:
        settings, length, began = self.settings, self.settings.virtual_tokens, self.clock()
        if settings.kind == "embeddings":
            student = Student(self.decoder, "embeddings", {"embeddings": self.context.untrained_embeddings(length)})
        elif teacher.observed:
            start = selected(self.decoder, self.context.full, teacher.observed, length)
            student = Student.from_prefix(self.decoder, start)
        else:
            student = Student.from_prefix(self.decoder, self.context.untrained_kv(length))
        if not teacher.observed:
            return student
        steps, seconds = settings.matching_steps, None
        if self.budget is not None:
            left = self.budget - self.job.elapsed()
            seconds = max(0.01, min(MATCHING_SHARE * self.budget - (self.clock() - began), left / 2))

        def on_step(step: int, error: float) -> None:
            if step % 10 == 0 or step == steps:
                self._report("matching", step, steps, began, error)
                self._check_stop()

        matching = MatchingSettings(steps, seconds)
        fit(student, teacher.observed, matching, self.clock, on_step, self.directory / MATCHING_FILE)
        return student

    def _train(
        self, student: Student, pairs: Sequence[TrainingPair], teacher: TeacherOutputs, reserve: float
    ) -> TrainingResult:
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
        trainer = Trainer(student, pairs, teacher.states, training, self.directory / "checkpoint", self.clock)
        if not trainer.resume():
            trainer.save()
        (self.directory / MATCHING_FILE).unlink(missing_ok=True)
        if self.budget is not None:
            left = max(1.0, self.budget - self.job.elapsed() - reserve)
            trainer.allow(trainer.state.elapsed + left)
        return trainer.run(self.on_progress, self._is_stopped)

    def _facts(
        self, tensors: dict[str, Tensor], pairs: Sequence[TrainingPair], result: TrainingResult, prefill_seconds: float
    ) -> dict[str, Any]:
        seconds, settings, context = self.opening + self.job.elapsed(), self.settings, self.context
        return {
            "compression_ratio": round(context.num_tokens / settings.virtual_tokens, 3),
            "seconds": round(seconds, 2),
            "break_even_requests": break_even(seconds, prefill_seconds),
            "context_prefill_seconds": round(prefill_seconds, 4),
            "bytes": sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()),
            "context_kv_bytes": sum(prefix.num_bytes for prefix in context.full),
            "context_tokens": context.num_tokens,
            "segments": len(context.segments),
            "virtual_tokens": settings.virtual_tokens,
            "kind": settings.kind,
            "objective": settings.objective,
            "wrong_prompt_is_trained": self.wrong_prefix is not None,
            "training": {**asdict(settings), "questions": len(pairs), "steps": result.steps},
            "curve": thinned(result.curve),
        }
