"""Questions over the whole context: filled in from it (questions.py) and, on request, asked by the model itself.

Every step is deterministic for a seed.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

import regex

from softbatch.prompt_store.compression.data.examples import Example
from softbatch.prompt_store.compression.data.language import is_english, is_question, language_check
from softbatch.prompt_store.compression.data.phrases import plain, sentences
from softbatch.prompt_store.compression.data.questions import GENERAL, questions_from
from softbatch.prompt_store.compression.data.recitation import recitations
from softbatch.prompt_store.compression.data.selection import ECHOES, Deduplicator

# The part of the template questions that is answered by a passage of the context.
RECITED = 0.15
# And where no templates are known: passages to go on from are then much of what can be asked.
RECITED_NEUTRALLY = 0.4


def template_questions(context: str, count: int, seed: int = 0) -> list[Example]:
    """Up to `count` questions from templates, duplicates dropped, spread over the kinds and the whole
    context."""
    english = is_english(context)
    general = GENERAL[: count // 25] if english else ()
    found: list[Example] = [Example(text, None, "general", 0.0, "template") for text in general]
    kept = Deduplicator(context)
    found = [example for example in found if kept.add(example.input)]
    recited = recitations(context, int(count * (RECITED if english else RECITED_NEUTRALLY)), random.Random(seed))
    recited_examples = [
        Example(question, passage, "recite", min(position, 0.9999), "template", cut=True)
        for question, passage, position in recited
        if kept.add(question, may_echo=True)
    ]
    count -= len(recited_examples)
    for question, kind, position in questions_from(context, random.Random(seed)):
        if len(found) >= count:
            break
        if kept.add(question, kind in ECHOES):
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
_ASK_IN_ITS_LANGUAGE = (
    "Write three short questions that this text answers, in the language that it is written in:\n\n{quote}",
)


def question_prompts(context: str, count: int, seed: int = 0) -> list[tuple[str, float]]:
    """(message, position) of up to `count` requests to the model for questions of its own, evenly over the
    text."""
    found = sentences(context)
    rng = random.Random(seed)
    forms = _ASK_FOR_QUESTIONS if is_english(context) else _ASK_IN_ITS_LANGUAGE
    picked = [found[index * len(found) // count] for index in range(count)] if len(found) > count else found
    return [(rng.choice(forms).format(quote=part.text[:300]), part.position) for part in picked]


_LINES = regex.compile(r"\n+|(?<=[?\uff1f\u061f\u037e])\s*(?=\S)")


def model_questions(context: str, replies: Sequence[tuple[str, float]]) -> list[Example]:
    """The usable questions in (reply, position) of `question_prompts`: whole, new, and no echo of the
    context."""
    kept, is_of_language = Deduplicator(context), language_check(context)
    found = []
    for reply, position in replies:
        for line in _LINES.split(reply):
            question = plain(re.sub(r"^\s*(?:[-*•]|\d+[.):])\s*", "", line)).strip(" \"'")
            if is_question(question) and is_of_language(question) and kept.add(question):
                found.append(Example(question, None, "model", position, "model"))
    return found
