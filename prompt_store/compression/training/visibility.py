"""Mixed visibility: a part of the pairs once more with passages before the question, as a request with recall has them.

What σ was only trained alone it does not bear beside text: passages behind it then pull answers away from both. Some
of the passages are the wrong ones, so that σ is not given up for whatever stands before the question.
"""

from __future__ import annotations

from collections.abc import Sequence

from softbatch.prompt_store.compression.data.accepted import is_right
from softbatch.prompt_store.compression.data.examples import Example
from softbatch.prompt_store.compression.data.passage_index import PassageIndex
from softbatch.prompt_store.compression.data.passages import Passage, before_question
from softbatch.prompt_store.compression.frozen.rendering import TrainingPair
from softbatch.prompt_store.compression.frozen.tokenized_context import TokenizedContext
from softbatch.prompt_store.compression.training.hidden_states import TeacherOutputs

# Every third pair once more, which makes a quarter of all: three quarters isolated are the share of Cartridges at Scale
# (arXiv 2606.04557). Of those with passages every third has wrong ones.
EVERY = 3
WRONG_EVERY = 3


def with_passages(
    pairs: Sequence[TrainingPair],
    teacher: TeacherOutputs,
    examples: Sequence[Example],
    context: TokenizedContext,
    recall: int,
    virtual_tokens: int,
) -> tuple[list[TrainingPair], TeacherOutputs]:
    """The pairs of the examples and, behind them, some with `recall` passages in the student's turn; their teacher and
    its states are the same."""
    more: list[TrainingPair] = []
    states = list(teacher.states)
    index = PassageIndex(context.text)
    for at in range(EVERY - 1, len(pairs), EVERY):
        pair, example = pairs[at], examples[at]
        is_wrong = (at // EVERY) % WRONG_EVERY == WRONG_EVERY - 1
        found = _wrong(index, example, recall) if is_wrong else index.best(example.input, recall)
        prompt = tuple(context.renderer.question(before_question(found, example.input)))
        if not found or virtual_tokens + len(prompt) + len(pair.answer) > context.window:
            continue
        more.append(TrainingPair(prompt, pair.answer, pair.group))
        states.append(teacher.states[at])
    return [*pairs, *more], TeacherOutputs(states, teacher.observed)


def _wrong(index: PassageIndex, example: Example, recall: int) -> list[Passage]:
    """Those that come behind the best, and do not hold what is asked for."""
    found = index.best(example.input, 2 * recall + 2)
    kept = [one for one in found if one.text != example.passage and not is_right(one.text, example.accept)]
    return kept[recall if not example.accept else 0 :][:recall]
