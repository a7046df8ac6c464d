"""From a context to σ and its report: questions, gold answers, baselines, learning, evaluation.

Every phase leaves its result in the work directory, so that a run that was killed goes on where it was; the time
already spent counts against the budget.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from softbatch.prompt_store.compression.compression_settings import CompressionSettings
from softbatch.prompt_store.compression.data.coverage import coverage
from softbatch.prompt_store.compression.data.examples import Example, Generate
from softbatch.prompt_store.compression.data.selection import evenly, split
from softbatch.prompt_store.compression.evaluation.baselines import measure_baselines
from softbatch.prompt_store.compression.evaluation.evaluation import (
    Candidate,
    Evaluation,
    Measured,
    load_measured,
    save_measured,
)
from softbatch.prompt_store.compression.evaluation.free_answers import (
    WITH_SIGMA,
    WITHOUT_SIGMA,
    Answers,
    FreeAnswers,
    Respond,
    Sigma,
    load_answers,
    save_answers,
)
from softbatch.prompt_store.compression.evaluation.report import break_even, build_report, thinned, write_report
from softbatch.prompt_store.compression.evaluation.verdict import verdict_of
from softbatch.prompt_store.compression.forecast import (
    Forecast,
    forecast,
    load_forecast,
    measure_speeds,
    save_forecast,
)
from softbatch.prompt_store.compression.frozen.context import Context
from softbatch.prompt_store.compression.frozen.frozen_model import Decoder
from softbatch.prompt_store.compression.frozen.prefix import Prefix
from softbatch.prompt_store.compression.frozen.tokenized_context import TokenizedContext
from softbatch.prompt_store.compression.gold import GoldAnswers
from softbatch.prompt_store.compression.learning import Learned, Learning
from softbatch.prompt_store.compression.outcome import Outcome as Outcome
from softbatch.prompt_store.compression.outcome import preview_of
from softbatch.prompt_store.compression.pace import FIRST_CHUNK, Pace
from softbatch.prompt_store.compression.progress import Progress
from softbatch.prompt_store.compression.work_directory import JobDirectory, identity_of

# Shares of a time budget after which a phase takes what it has and goes on.
HELD_OUT_SHARE = 0.12
GOLD_SHARE = 0.28
EVALUATION_STEPS = 7
PROBE_SHARE = 0.02  # for answers that only show what one takes
MOST_PROBED = 16
# What the phases behind the forecast write.
BEHIND_FORECAST = ("train.jsonl", "answers.json", "baselines.json", "teacher.safetensors", "checkpoint/state.json")


class Compression:
    """One compression of one context. `generate` answers prompts greedily (see data.examples.Generate): every prompt
    begins with the same context tokens, except that a long context's segments come one after another. `respond` does so
    with σ and without it. `opening` seconds of the budget have gone into opening the model, `engine` of them into what
    answers, which is opened once more for σ. `on_preview` gets σ as soon as there is one. The user's questions that say
    which answers are right are for measuring, all others for training.
    """

    def __init__(
        self,
        decoder: Decoder,
        context: TokenizedContext,
        settings: CompressionSettings,
        generate: Generate,
        respond: Respond,
        directory: Path,
        user_examples: Sequence[Example] = (),
        wrong_prefix: Prefix | None = None,
        on_progress: Callable[[Progress], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
        on_preview: Callable[[Outcome], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
        opening: float = 0.0,
        engine: float = 0.0,
    ) -> None:
        self.context, self.settings, self.directory = Context(decoder, context), settings, directory
        self.user_examples = [example for example in user_examples if not example.accept]
        self.graded = [example for example in user_examples if example.accept]
        self.wrong_prefix, self.respond, self.engine = wrong_prefix, respond, engine
        self.on_preview = on_preview
        self.job = JobDirectory(directory, identity_of(settings, context.text, user_examples), clock)
        told, stop = on_progress or (lambda _: None), should_stop or (lambda: False)
        self.pace = Pace(settings.seconds, opening, self.job, clock, told, stop)
        self.gold = GoldAnswers(self.context, settings, generate, directory, self.pace)
        self.learning = Learning(self.context, settings, directory, self.pace)

    def run(self, resume: bool = False) -> Outcome:
        """Raises Stopped; ValueError when asked to resume another run's directory."""
        self.job.open(resume)
        self._warn_of_opening()
        training, held_out = self._questions()
        plan = self._forecast(training, held_out)
        if plan is not None:
            training, held_out = training[: plan.training_pairs], held_out[: plan.held_out]
        held_out = self.gold.answer(held_out, "held_out", HELD_OUT_SHARE, "train.jsonl")
        evaluation = self._preview(training, held_out)
        training = self.gold.answer(training, "train", GOLD_SHARE, "baselines.json")
        if not held_out or not training:
            raise ValueError("the model answers none of the questions about this context")
        free = self._free_answers(held_out, plan)
        answers, seconds = self._answers(free)
        prefill_seconds = self.context.prefill_seconds(self.pace.clock)
        evaluation = evaluation or self._evaluation(held_out)
        baselines = self._baselines(evaluation)
        # What is still to come is like one baseline, σ's answers, and writing it all down: only that is kept back.
        dearest = max(measured.seconds for measured in baselines.values())
        reserve = 1.5 * dearest + 4.0 + self.engine + 1.5 * seconds * len(WITH_SIGMA)
        learned = self.learning.learn(training, reserve, evaluation.loss, dearest)
        self.pace.check_stop()
        sigma, off_topic = self._measured(evaluation, learned)
        tensors = {name: tensor.cpu() for name, tensor in learned.student.tensors().items()}
        answers |= self._answers_with(free, Sigma(self.settings.kind, tensors))
        facts = self._facts(tensors, learned, prefill_seconds, plan)
        facts["coverage"] = coverage(self.context.tokenized.text, training)
        report = build_report(evaluation, sigma, baselines, off_topic, facts, free, answers)
        report["verdict"] = verdict_of(report, learned.loss_before)
        write_report(report, self.directory)
        return Outcome(self.settings.kind, tensors, report, self.context.tokenized.sha256, self.context.num_tokens)

    def _warn_of_opening(self) -> None:
        """Said at once: on a slow or busy machine the forecast's own small steps come late in a short budget."""
        pace = self.pace
        if pace.budget is not None and pace.opening > pace.budget:
            pace.note = (
                f"opening the model alone took {pace.opening:.0f} s of {self.settings.minutes:g} minutes, which leaves"
                " little for answers, measuring and training; give it more --minutes"
            )

    def _questions(self) -> tuple[list[Example], list[Example]]:
        settings = self.settings
        training, held_out = split(
            self.gold.questions(self.user_examples, self.graded), settings.held_out, settings.seed
        )
        if not held_out or not training:
            raise ValueError("context: too few questions can be made of it to train on some and measure on others")
        return training, held_out

    def _forecast(self, training: Sequence[Example], held_out: Sequence[Example]) -> Forecast | None:
        """What there is time for, and a word to the user when that is too little; None without a budget, and in a run
        that got behind its forecast without one: what it has stored was made without a plan."""
        path, pace = self.directory / "forecast.json", self.pace
        if pace.budget is None:
            return None
        found = load_forecast(path)
        if found is None:
            if self.job.has_any(BEHIND_FORECAST):
                return None
            found = self._measured_forecast(training, held_out)
            if found is None:
                return None
            save_forecast(found, path)
        pace.note = found.warning(self.settings.minutes or 0.0) if found.is_too_short else None
        pace.tell("estimate", 1, 1)
        return found

    def _measured_forecast(self, training: Sequence[Example], held_out: Sequence[Example]) -> Forecast | None:
        """From the next answers and small steps behind them; None when there is nothing left to answer."""
        gold, pace, done = self.gold, self.pace, self.gold.count("held_out")
        rates = list[float]()

        def answer(end: int) -> list[Example]:
            found = gold.answer(held_out[:end], "held_out", 1.0, "train.jsonl")
            rates.extend([] if gold.seconds_per_answer is None else [gold.seconds_per_answer])
            return found

        # The first answers wait for the context's KV; the next ones show what an answer takes.
        for end in (done + FIRST_CHUNK, done + 2 * FIRST_CHUNK):
            answered = answer(end)
        # Many at once take much less each, which the last part of these shows, where they cost little.
        allowed = PROBE_SHARE * (pace.budget or 0.0)
        if rates and 0 < MOST_PROBED * rates[-1] < allowed:
            answered = answer(done + 3 * FIRST_CHUNK + MOST_PROBED)
        pairs = [self.context.pair(example) for example in answered[-FIRST_CHUNK:]]
        if not pairs or not rates:
            return None
        # Some questions come with their answers.
        asked = [example.output is None for example in (*training, *held_out)]
        # One that is left over at the end takes more than many at once.
        per_question = min(rates) * sum(asked) / len(asked)
        speeds = measure_speeds(self.context, pairs, self.settings, per_question, pace.clock, self.engine)
        spent, counts = pace.opening + pace.spent, (len(held_out), len(training), len(self.graded))
        return forecast(speeds, self.settings, spent, pace.left, *counts)

    def _free_answers(self, held_out: Sequence[Example], plan: Forecast | None) -> FreeAnswers:
        """The graded questions, or as many as there is time for, and some of the others, evenly chosen."""
        count = min(self.settings.free_answers if plan is None else plan.free_answers, len(held_out))
        graded = self.graded if plan is None else evenly(self.graded, plan.graded)
        examples = [*self.context.tokenized.placed(graded), *evenly(held_out, count)]
        return FreeAnswers(self.context.tokenized, examples, self.settings.virtual_tokens, self.respond)

    def _answers(self, free: FreeAnswers) -> tuple[dict[str, Answers], float]:
        """What is answered without σ, and the seconds that one candidate took."""
        path, pace, began = self.directory / "answers.json", self.pace, self.pace.clock()
        found = load_answers(path)
        asked = [name for name in WITHOUT_SIGMA if name not in found]
        for done, name in enumerate(asked, start=1):
            found[name] = free.ask(name)
            save_answers(found, path)
            pace.tell("answers", done, len(asked), began)
            pace.check_stop()
        return found, (pace.clock() - began) / max(1, len(asked))

    def _answers_with(self, free: FreeAnswers, sigma: Sigma) -> dict[str, Answers]:
        found, began = dict[str, Answers](), self.pace.clock()
        for done, name in enumerate(WITH_SIGMA, start=1):
            found[name] = free.ask(name, sigma)
            self.pace.tell("answers", done, len(WITH_SIGMA), began)
        return found

    def _evaluation(self, held_out: Sequence[Example]) -> Evaluation:
        context, longest = self.context, self.settings.max_answer_tokens
        return Evaluation(
            context.decoder, context.renderer, context.segments, context.full, held_out, longest, self.pace.clock
        )

    def _baselines(self, evaluation: Evaluation) -> dict[str, Measured]:
        kept = load_measured(self.directory / "baselines.json")
        if kept is not None:
            return kept
        began, settings, pace = self.pace.clock(), self.settings, self.pace
        done: list[str] = []

        def on_done(name: str) -> None:
            done.append(name)
            pace.tell("evaluation", len(done), EVALUATION_STEPS, began)
            pace.check_stop()

        found = measure_baselines(
            evaluation,
            self.context,
            settings.kind,
            settings.virtual_tokens,
            self.wrong_prefix,
            on_done,
        )
        save_measured(found, self.directory / "baselines.json")
        return found

    def _preview(self, training: Sequence[Example], held_out: Sequence[Example]) -> Evaluation | None:
        """If it is asked for: made of the first answers, as those to all the others take far longer."""
        if self.on_preview is None:
            return None
        first = training[: self.learning.preview_pairs]
        answered = self.gold.answer(first, "train", GOLD_SHARE, "baselines.json")
        if not held_out or not answered:
            return None
        student, evaluation = self.learning.preview(answered), self._evaluation(held_out)
        self.on_preview(preview_of(student, self.context, self.settings, evaluation))
        return evaluation

    def _measured(self, evaluation: Evaluation, learned: Learned) -> tuple[Measured, dict[str, float]]:
        """σ on the held-out questions, and off the topic."""
        began, prefix = self.pace.clock(), learned.student.fixed_prefix()
        sigma = evaluation.measure(Candidate.shared(prefix, len(self.context.full)))
        self.pace.tell("evaluation", EVALUATION_STEPS - 1, EVALUATION_STEPS, began)
        off_topic = evaluation.off_topic(prefix)
        self.pace.tell("evaluation", EVALUATION_STEPS, EVALUATION_STEPS, began)
        return sigma, off_topic

    def _facts(
        self, tensors: dict[str, Tensor], learned: Learned, prefill_seconds: float, plan: Forecast | None
    ) -> dict[str, Any]:
        seconds, settings, context = self.pace.opening + self.pace.spent, self.settings, self.context
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
            "training": {
                **asdict(settings),
                "minutes": None if settings.seconds is None else settings.minutes,
                "questions": len(learned.pairs),
                "steps": learned.result.steps,
            },
            "forecast": None if plan is None else plan.seconds,
            "curve": thinned(learned.result.curve),
        }
