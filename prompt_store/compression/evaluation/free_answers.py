"""What is answered freely with σ, and with everything a user could do instead; all on the engine that serves."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean, median
from typing import Any, Protocol

from torch import Tensor

from softbatch.prompt_store.atomic_files import replace_file
from softbatch.prompt_store.compression.compression_settings import Kind
from softbatch.prompt_store.compression.data.accepted import Share, is_right
from softbatch.prompt_store.compression.data.examples import Example
from softbatch.prompt_store.compression.data.passage_index import PassageIndex, within
from softbatch.prompt_store.compression.data.passages import Passage, before_question, joined
from softbatch.prompt_store.compression.evaluation.fidelity import FidelityScores, answer_scores
from softbatch.prompt_store.compression.frozen.rendering import group_of
from softbatch.prompt_store.compression.frozen.tokenized_context import TokenizedContext
from softbatch.prompt_store.compression.frozen.untrained_start import truncated_ids
from softbatch.prompt_store.manifest import Replaces

WITHOUT_SIGMA = ("full_context", "no_context", "truncated", "retrieval", "retrieval_3x", "retrieval_recall")
WITH_SIGMA = ("soft_prompt", "recall")
RECALLED = 2  # passages behind σ
# Raised when passages stand otherwise in prompts: answers to others do not belong beside them in a report.
PASSAGE_ORDER = 2
_MOST_PASSAGES = 16


@dataclass(frozen=True)
class Sigma:
    """A soft prompt as the engine is given it."""

    kind: Kind
    tensors: dict[str, Tensor]
    replaces: Replaces = "system"

    @property
    def length(self) -> int:
        return next(iter(self.tensors.values())).shape[1 if self.kind == "kv" else 0]


@dataclass(frozen=True)
class Response:
    """Greedy tokens, with the one that ended them; the seconds to the first where it was timed alone."""

    ids: list[int]
    first_token_seconds: float | None = None


class Respond(Protocol):
    """Greedy answers to prompts, behind σ if there is one. What the prompts share at their start is computed once."""

    def __call__(self, prompts: list[list[int]], max_tokens: int, sigma: Sigma | None) -> list[Response]: ...


@dataclass(frozen=True)
class Answers:
    """To all questions, in their order. `prompt_tokens` are a request's on average, virtual ones included;
    `first_token_seconds` those of one alone, with what it shares with others in the cache."""

    texts: list[str]
    prompt_tokens: float
    first_token_seconds: float | None


class FreeAnswers:
    """The questions that are answered freely: those with accepted texts, and some of the others, whose full-context
    answers are known."""

    def __init__(
        self,
        context: TokenizedContext,
        examples: Sequence[Example],
        virtual_tokens: int,
        respond: Respond,
        replaces: Replaces = "system",
    ) -> None:
        self.context, self.examples = context, list(examples)
        self._virtual_tokens, self._respond, self._replaces = virtual_tokens, respond, replaces

    @cached_property
    def _index(self) -> PassageIndex:
        return PassageIndex(self.context.text)

    def ask(self, name: str, sigma: Sigma | None = None) -> Answers:
        """By one of WITHOUT_SIGMA, or of WITH_SIGMA with it."""
        context, renderer = self.context, self.context.renderer
        prompts = [self._prompt(name, example) for example in self.examples]
        if not prompts:
            return Answers([], 0.0, None)
        longest = context.max_answer_tokens
        answered: list[Response | None] = [None] * len(prompts)
        # Of a context in segments the questions about one together, so that they find its KV.
        groups = [group_of(example, context.segments) for example in self.examples]
        for group in sorted(set(groups)):
            mine = [index for index, of in enumerate(groups) if of == group]
            found = self._respond([prompts[index] for index in mine], longest, sigma)
            for index, response in zip(mine, found, strict=True):
                answered[index] = response
        known = [response for response in answered if response is not None]
        timed = [seconds for one in known if (seconds := one.first_token_seconds) is not None]
        virtual = 0 if sigma is None else sigma.length
        return Answers(
            [renderer.answer(one.ids, longest, renderer.stop_ids)[0] for one in known],
            round(virtual + fmean(map(len, prompts)), 1),
            round(median(timed), 4) if timed else None,
        )

    def _prompt(self, name: str, example: Example) -> list[int]:
        renderer, segments = self.context.renderer, self.context.segments
        question = renderer.question(example.input)
        usual = renderer.without_context()

        def retrieved(some: Sequence[Passage]) -> list[int]:
            return [*(renderer.context(joined(some)) if some else usual), *question]

        if name == "full_context":
            return [*segments[group_of(example, segments)].ids, *question]
        if name == "no_context":
            return [*usual, *question]
        if name == "truncated":
            first = segments[0].ids
            _, tail = renderer.frame()
            return [*truncated_ids(first, min(self._virtual_tokens, len(first)), tail), *question]
        if name in ("retrieval", "retrieval_3x"):
            found = self._passages(example.input, self._virtual_tokens * (3 if name == "retrieval_3x" else 1))
            return self._fitting(found, retrieved)
        if name == "retrieval_recall":
            total = self._virtual_tokens + len(self._prompt("recall", example))
            return self._fitting(self._as_long(example.input, total, retrieved), retrieved)
        before = usual if self._replaces == "nothing" else []
        found = self._index.best(example.input, RECALLED) if name == "recall" else []
        return self._fitting(found, lambda some: [*before, *renderer.question(before_question(some, example.input))])

    def _fitting(self, found: Sequence[Passage], prompt: Callable[[Sequence[Passage]], list[int]]) -> list[int]:
        """The prompt with as many of the passages as leave room for σ and an answer in the model's window."""
        room = self.context.window - self._virtual_tokens - self.context.max_answer_tokens
        for count in range(len(found), 0, -1):
            if len(ids := prompt(found[:count])) <= room:
                return ids
        return prompt([])

    def _passages(self, question: str, budget: int) -> list[Passage]:
        """The best that fit the budget together; the best in any case."""
        best = self._index.best(question, _MOST_PASSAGES)
        return within(best, [len(self.context.renderer.tokens(passage.text)) for passage in best], budget)

    def _as_long(self, question: str, total: int, prompt: Callable[[Sequence[Passage]], list[int]]) -> list[Passage]:
        """As many of the best as bring the prompt nearest to `total` tokens."""
        best = self._index.best(question, _MOST_PASSAGES)
        counts = range(len(best) + 1)
        return best[: min(counts, key=lambda count: abs(len(prompt(best[:count])) - total))]


def as_scores(scores: FidelityScores, answers: Answers | None, free: FreeAnswers) -> FidelityScores:
    """With what the questions that have a gold answer, and no accepted texts, were answered freely."""
    known = [at for at, example in enumerate(free.examples) if example.output is not None and not example.accept]
    if answers is None or not known:
        return scores
    gold = [free.examples[at].output or "" for at in known]
    exact, f1 = answer_scores([answers.texts[at] for at in known], gold, free.context.renderer.tokens)
    return replace(scores, exact_match=exact, token_f1=f1)


def right_answers(free: FreeAnswers, found: Mapping[str, Answers]) -> dict[str, dict[str, Any]]:
    """Per candidate, how many answers contain an accepted text, with Wilson's interval, and what a request costs."""
    graded = [at for at, example in enumerate(free.examples) if example.accept]
    rows: dict[str, dict[str, Any]] = {}
    for name in (*WITH_SIGMA, *WITHOUT_SIGMA):
        answers = found.get(name)
        if answers is None or not free.examples:
            continue
        row: dict[str, Any] = {}
        if graded:
            share = Share(sum(is_right(answers.texts[at], free.examples[at].accept) for at in graded), len(graded))
            low, high = share.bounds
            row = {"right": share.right, "questions": share.questions, "low": round(low, 4), "high": round(high, 4)}
        rows[name] = row | {
            "prompt_tokens": answers.prompt_tokens,
            "first_token_seconds": answers.first_token_seconds,
        }
    return rows


def save_answers(found: Mapping[str, Answers], path: Path) -> None:
    """For a run that goes on later."""
    record = {"order": PASSAGE_ORDER, "answers": {name: asdict(answers) for name, answers in found.items()}}
    replace_file(path, lambda target: target.write_text(json.dumps(record, ensure_ascii=False), encoding="utf-8"))


def load_answers(path: Path) -> dict[str, Answers]:
    """Empty where there is nothing of use: it is then asked again."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["order"] != PASSAGE_ORDER:
            return {}
        return {name: Answers(**answers) for name, answers in record["answers"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
