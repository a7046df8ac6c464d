"""Which examples are kept, which are held out for the report, and which come first."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from typing import TypeVar

from softbatch.prompt_store.compression.data.examples import Example
from softbatch.prompt_store.compression.data.language import words_of
from softbatch.prompt_store.compression.data.phrases import title

T = TypeVar("T")
# Kinds of questions that hold words of the context: its own questions, and parts of it to go on from.
ECHOES = frozenset({"own", "quote", "continue", "recite"})
_PARTS = 3  # of what may be held out, one is at most


class Deduplicator:
    """Says which questions are worth keeping: not empty, no echo of a sentence of the context, not nearly
    asked."""

    def __init__(self, context: str, threshold: float = 0.8) -> None:
        self._context = " ".join(words_of(context))
        self._title = set(words_of(title(context)))
        self._threshold = threshold
        self._seen: list[frozenset[str]] = []
        self._index: dict[str, list[int]] = {}

    def add(self, question: str, may_echo: bool = False) -> bool:
        """Whether it is kept; a question that the context itself asks, or that quotes it on purpose, `may_echo`."""
        words = words_of(question)
        if len(words) < 2 or len(question) > 400:
            return False
        if not may_echo and len(words) > 3 and " ".join(words) in self._context:
            return False
        if self.has_nearly(question):
            return False
        self.note(question)
        return True

    def note(self, question: str) -> None:
        """It is asked already, whatever it is like."""
        content = self._content(words_of(question))
        for word in content:
            self._index.setdefault(word, []).append(len(self._seen))
        self._seen.append(content)

    def has_nearly(self, question: str) -> bool:
        """Whether one that was kept or noted asks nearly the same."""
        content = self._content(words_of(question))
        rivals = {index for word in content for index in self._index.get(word, ())}
        return any(
            len(content & other) >= self._threshold * len(content | other)
            for other in (self._seen[index] for index in rivals)
        )

    def _content(self, words: Sequence[str]) -> frozenset[str]:
        return frozenset(word for word in words if word not in self._title) or frozenset(words)


def merge(user: Sequence[Example], own: Sequence[Example], context: str, count: int) -> list[Example]:
    """The user's questions, all and first, then own ones that they do not nearly ask already, `count` in
    all."""
    kept = Deduplicator(context)
    for example in user:
        kept.add(example.input)
    merged = list(user)
    for example in own:
        if len(merged) >= count:
            break
        if kept.add(example.input, example.kind in ECHOES):
            merged.append(example)
    return merged


def unasked(facts: Sequence[Example], others: Sequence[Example], context: str) -> list[Example]:
    """The facts that none of the others nearly asks for: those may be held out or graded, and facts are trained on.
    Facts of one sentence are much alike, and stay."""
    kept = Deduplicator(context)
    for example in others:
        kept.note(example.input)
    return [fact for fact in facts if not kept.has_nearly(fact.input)]


def fewest(others: Sequence[Example], held_out: int) -> int:
    """How many of the others, from the first on, `split` needs to hold out as many as asked; all where they are few."""
    able = 0
    for count, example in enumerate(others, start=1):
        able += _may_be_held_out(example)
        if able == _PARTS * held_out:
            return count
    return len(others)


def split(examples: Sequence[Example], held_out: int, seed: int = 0) -> tuple[list[Example], list[Example]]:
    """(training, held out): whole (kind, place) cells are held out, so that no kind of question about a place
    of the context is on both sides, while every kind and every place is on both; of so few questions that this
    cannot be, some. The user's are never held out."""
    own = [example for example in examples if _may_be_held_out(example)]
    wanted = min(held_out, len(own) // _PARTS)
    cells = _held_out_cells(own, wanted, seed)
    chosen = {id(e) for e in own if (e.kind, e.place) in cells} or {id(e) for e in own[1::3][:wanted]}
    return [e for e in examples if id(e) not in chosen], [e for e in examples if id(e) in chosen]


def _held_out_cells(own: Sequence[Example], wanted: int, seed: int) -> set[tuple[str, int]]:
    """(kind, place) cells of about `wanted` questions: at most half of each kind and of each place."""
    kinds, places = Counter(e.kind for e in own), Counter(e.place for e in own)
    cells = Counter((e.kind, e.place) for e in own)
    candidates = sorted(cells)
    random.Random(seed).shuffle(candidates)
    chosen: set[tuple[str, int]] = set()
    taken_kinds: Counter[str] = Counter()
    taken_places: Counter[int] = Counter()
    while candidates and sum(taken_kinds.values()) < wanted:
        # The kind and the place of which the smallest part is held out so far.
        kind, place = min(
            candidates,
            key=lambda cell: taken_kinds[cell[0]] / kinds[cell[0]] + taken_places[cell[1]] / places[cell[1]],
        )
        candidates.remove((kind, place))
        size = cells[kind, place]
        small = size <= max(2, wanted // 6)
        if small and taken_kinds[kind] + size <= kinds[kind] // 2 and taken_places[place] + size <= places[place] // 2:
            chosen.add((kind, place))
            taken_kinds[kind] += size
            taken_places[place] += size
    return chosen


def _may_be_held_out(example: Example) -> bool:
    """Not the user's, and to be answered by the model with nothing but the context: a recitation is no gold answer to
    measure against."""
    return example.source != "user" and example.output is None and not example.passage


def usable(example: Example) -> bool:
    """Whether the gold answer is neither missing, empty, nor the question again."""
    output = words_of(example.output or "")
    return bool(output) and output != words_of(example.input)


def surplus_recitations(examples: Sequence[Example]) -> list[int]:
    """Two of three recitations, by index: matching likes them all; in training their KL, many times that of an answer,
    would drown the rest."""
    recited = [index for index, example in enumerate(examples) if example.kind == "recite"]
    return [index for at, index in enumerate(recited) if at % 3]


def spread_first(examples: Sequence[Example], count: int) -> list[Example]:
    """The same examples, `count` of them that are spread evenly over all come first, where there are so many that the
    full-context model was shown no passage for."""
    able = [index for index, example in enumerate(examples) if not example.passage]
    chosen = dict.fromkeys(evenly(able, count)) if count < len(examples) else {}
    return [examples[index] for index in chosen] + [e for index, e in enumerate(examples) if index not in chosen]


def mixed(facts: Sequence[Example], others: Sequence[Example], share: float) -> list[Example]:
    """Both in their order, with that share of facts in every beginning until one of them has come to its end."""
    found: list[Example] = []
    taken = 0
    while taken < len(facts) and len(found) - taken < len(others):
        if taken < share * (len(found) + 1):
            found.append(facts[taken])
            taken += 1
        else:
            found.append(others[len(found) - taken])
    rest = others[len(found) - taken :]
    return [*found, *facts[taken:], *rest]


def evenly(examples: Sequence[T], count: int) -> list[T]:
    """`count` of them, spread evenly over all; all where there are fewer."""
    if count >= len(examples):
        return list(examples)
    return [examples[index * len(examples) // count] for index in range(count)]
