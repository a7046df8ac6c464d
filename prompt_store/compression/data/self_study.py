"""Questions over the whole context: filled in from it (questions.py) and, on request, asked by the model itself.

Every step is deterministic for a seed.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from softbatch.prompt_store.compression.data.examples import Example
from softbatch.prompt_store.compression.data.phrases import plain, sentences
from softbatch.prompt_store.compression.data.questions import GENERAL, questions_from
from softbatch.prompt_store.compression.data.recitation import recitations
from softbatch.prompt_store.compression.data.selection import Deduplicator

# The part of the template questions that is answered by a passage of the context.
RECITED = 0.15


def template_questions(context: str, count: int, seed: int = 0) -> list[Example]:
    """Up to `count` questions from templates, duplicates dropped, spread over the kinds and the whole
    context."""
    found: list[Example] = [Example(text, None, "general", 0.0, "template") for text in GENERAL[: count // 25]]
    kept = Deduplicator(context)
    found = [example for example in found if kept.add(example.input)]
    recited = recitations(context, int(count * RECITED), random.Random(seed))
    recited_examples = [
        Example(question, passage, "recite", min(position, 0.9999), "template", cut=True)
        for question, passage, position in recited
        if kept.add(question)
    ]
    count -= len(recited_examples)
    for question, kind, position in questions_from(context, random.Random(seed)):
        if len(found) >= count:
            break
        if kept.add(question):
            found.append(Example(question, None, kind, min(position, 0.9999), "template"))
    return _interleaved(found, recited_examples)


def _interleaved(many: list[Example], few: list[Example]) -> list[Example]:
    """Both in their order, mixed evenly: a run short of time takes the first ones and still has both."""
    ranks = [((index + 0.5) / len(many), example) for index, example in enumerate(many)]
    ranks += [((index + 0.5) / len(few), example) for index, example in enumerate(few)]
    return [example for _, example in sorted(ranks, key=lambda pair: pair[0])]


_ASK_FOR_QUESTIONS = (
    'Write three short questions that a reader could ask about this part: "{quote}"',
    'Which three questions does this part answer? "{quote}"',
)


def question_prompts(context: str, count: int, seed: int = 0) -> list[tuple[str, float]]:
    """(message, position) of up to `count` requests to the model for questions of its own, evenly over the
    text."""
    found = sentences(context)
    rng = random.Random(seed)
    picked = [found[index * len(found) // count] for index in range(count)] if len(found) > count else found
    return [(rng.choice(_ASK_FOR_QUESTIONS).format(quote=part.text[:300]), part.position) for part in picked]


def model_questions(context: str, replies: Sequence[tuple[str, float]]) -> list[Example]:
    """The usable questions in (reply, position) of `question_prompts`: whole, new, and no echo of the
    context."""
    kept = Deduplicator(context)
    found = []
    for reply, position in replies:
        for line in re.split(r"\n+|(?<=\?)\s+", reply):
            question = plain(re.sub(r"^\s*(?:[-*•]|\d+[.):])\s*", "", line)).strip(" \"'")
            if question.endswith("?") and kept.add(question):
                found.append(Example(question, None, "model", position, "model"))
    return found
