"""What is asked about a context, and the full-context model's answers, kept in the work directory as they come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from softbatch.prompt_store.compression.compression_settings import CompressionSettings
from softbatch.prompt_store.compression.data.accepted import is_right
from softbatch.prompt_store.compression.data.examples import Example, Generate, load_jsonl, save_jsonl
from softbatch.prompt_store.compression.data.facts import Fact, fact_questions, facts_of, request_for
from softbatch.prompt_store.compression.data.language import is_english
from softbatch.prompt_store.compression.data.selection import fewest, merge, mixed, unasked, usable
from softbatch.prompt_store.compression.data.self_study import model_questions, question_prompts, template_questions
from softbatch.prompt_store.compression.evaluation.baselines import with_gold
from softbatch.prompt_store.compression.frozen.context import Context
from softbatch.prompt_store.compression.frozen.tokenized_context import QUESTION_ROOM
from softbatch.prompt_store.compression.pace import Pace

QUESTION_TOKENS = 96  # for three questions that the model asks
FACT_TOKENS = 40  # for one
FACT_SHARE = 0.08  # of the budget, for asking them
# Of a text that is not English: so many parts are asked about, every fourth first, to see whether the model is able.
FOREIGN_PROMPTS = 32
PROBE_STRIDE = 4
FOREIGN_SHARE = 0.08


class GoldAnswers:
    """The questions and answers of one run."""

    def __init__(
        self, context: Context, settings: CompressionSettings, generate: Generate, directory: Path, pace: Pace
    ) -> None:
        self.context, self.settings, self.generate = context, settings, generate
        self._directory, self._pace = directory, pace
        self.seconds_per_answer: float | None = None  # of the model's latest answers in this process

    def questions(self, user_examples: Sequence[Example], graded: Sequence[Example] = ()) -> list[Example]:
        """All questions, the user's first, without answers of the model yet; the same on every call. No fact asks
        nearly what a `graded` one asks."""
        path = self._directory / "questions.jsonl"
        if path.exists():
            return load_jsonl(path)
        settings, text = self.settings, self.context.tokenized.text
        count = settings.questions + settings.held_out
        own = self._of_the_model(text) + template_questions(text, count, settings.seed)
        others = merge(user_examples, own, text, count + len(user_examples))
        first, rest = others[: len(user_examples)], others[len(user_examples) :]
        facts = unasked(self._facts(text, count - fewest(rest, settings.held_out)), [*graded, *others], text)
        examples = [*first, *mixed(facts, rest[: count - len(facts)], settings.facts)]
        save_jsonl(self.context.tokenized.placed(examples), path)
        self._pace.tell("self_study", len(examples), len(examples))
        return load_jsonl(path)  # as a resumed run reads them, positions rounded

    def _facts(self, text: str, room: int) -> list[Example]:
        """Questions for what the text says exactly, in words of the model where it is able to ask: as many as a part of
        the budget allows, and no more than there is `room` for."""
        settings, pace, english = self.settings, self._pace, is_english(text)
        found = facts_of(text, settings.seed)[: min(room, int(settings.questions * settings.facts))]
        renderer, replies = self.context.renderer, list[tuple[Fact, str]]()
        before = renderer.without_context()
        share = pace.spent / pace.budget + FACT_SHARE if pace.budget else 1.0
        for part in pace.chunks(0, len(found), share, 0):
            asked = found[part.start : part.stop]
            prompts = [[*before, *renderer.question(request_for(fact, english))] for fact in asked]
            answers = self.generate(prompts, FACT_TOKENS)
            replies += [(fact, renderer.text(reply)) for fact, reply in zip(asked, answers, strict=True)]
        asked_for = fact_questions(text, replies, settings.seed)
        return [example for example in asked_for if len(renderer.question(example.asked)) <= QUESTION_ROOM]

    def _of_the_model(self, text: str) -> list[Example]:
        """As many as were asked for. Of a text that is not English, which no templates are made for, some in any case,
        if the model writes questions in its language, and while that takes little of the budget."""
        wanted, pace, began = self.settings.model_questions, self._pace, self._pace.clock()
        if wanted:
            return self._asked_by_the_model(text, question_prompts(text, wanted // 2 + 1, self.settings.seed))[:wanted]
        if is_english(text):
            return []
        prompts = question_prompts(text, FOREIGN_PROMPTS, self.settings.seed)
        found = self._asked_by_the_model(text, prompts[::PROBE_STRIDE])
        probed = len(prompts[::PROBE_STRIDE])
        rest = [prompt for index, prompt in enumerate(prompts) if index % PROBE_STRIDE]
        coming = (pace.clock() - began) / max(1, probed) * len(rest)
        if len(found) < probed:
            return []
        return found if pace.is_late(FOREIGN_SHARE, coming) else found + self._asked_by_the_model(text, rest)

    def _asked_by_the_model(self, text: str, prompts: Sequence[tuple[str, float]]) -> list[Example]:
        examples = [Example(message, None, "model", position, "model") for message, position in prompts]
        replies = self.context.ask(examples, QUESTION_TOKENS, self.generate)
        texts = [self.context.renderer.text(reply) for reply in replies]
        return model_questions(text, [(t, e.position) for t, e in zip(texts, examples, strict=True)])

    def count(self, name: str) -> int:
        """How many questions of `name`.jsonl are answered."""
        return len(self._kept(self._directory / f"{name}.jsonl"))

    def _kept(self, path: Path) -> list[Example]:
        return load_jsonl(path) if path.exists() and path.stat().st_size else []

    def answer(self, examples: Sequence[Example], name: str, share: float, next_file: str) -> list[Example]:
        """The usable ones of the examples with gold answers, as many as that share of the budget allows; kept in
        `name`.jsonl. Where the phase behind this one has begun `next_file`, no more are asked for."""
        path = self._directory / f"{name}.jsonl"
        done = self._kept(path)
        if (self._directory / next_file).exists():
            return [example for example in done[: len(examples)] if usable(example)]
        began = self._pace.clock()
        for part in self._pace.chunks(len(done), len(examples), share, self.settings.batch_size):
            started, asked = self._pace.clock(), examples[part.start : part.stop]
            answers = with_gold(self.context, asked, self.generate)
            if wanting := sum(example.output is None for example in asked):
                self.seconds_per_answer = (self._pace.clock() - started) / wanting
            for example in answers:
                # The file has no empty answers; one that echoes the question is as unusable.
                # Nor has what the model, shown the passage, answers with none of what the passage says.
                wrong = bool(example.passage and example.accept) and not is_right(example.output or "", example.accept)
                unusable = wrong or not (example.output or "").strip()
                done.append(replace(example, output=example.input) if unusable else example)
            save_jsonl(done, path)
            self._pace.tell("gold", len(done), len(examples), began)
        return [example for example in done[: len(examples)] if usable(example)]
