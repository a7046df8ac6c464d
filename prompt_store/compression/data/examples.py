"""The training data: questions over the whole context, each with the model's own gold answer.

The user's own questions come first; then questions filled in from the context (questions.py) and, on request,
the model's own. Every step is deterministic for a seed.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from softbatch.prompt_store.atomic_files import replace_file
from softbatch.prompt_store.compression.data.phrases import plain, sentences, title
from softbatch.prompt_store.compression.data.questions import GENERAL, questions_from
from softbatch.prompt_store.compression.data.recitation import recitations

Generate = Callable[[list[list[int]], int], list[list[int]]]

MAX_TEXT = 20_000
MAX_EXAMPLES = 100_000
PLACES = 16
# The part of the template questions that is answered by a passage of the context.
RECITED = 0.15
_FIELDS = {"input", "output", "kind", "position", "source", "cut"}
_WORD = re.compile(r"\w+")


def words_of(text: str) -> list[str]:
    return _WORD.findall(text.lower())


class DataError(ValueError):
    """A questions file that cannot be used; the message names the line."""


@dataclass(frozen=True)
class Example:
    """One question z and, once known, its gold answer ŷ. `position` in [0, 1) is the place in the context
    that the question is about; `source` is user, template or model; `cut` says that ŷ was cut at the token
    limit."""

    input: str
    output: str | None = None
    kind: str = "user"
    position: float = 0.0
    source: str = "user"
    cut: bool = False

    @property
    def place(self) -> int:
        return min(PLACES - 1, int(self.position * PLACES))


def save_jsonl(examples: Iterable[Example], path: Path) -> None:
    """One JSON object a line; read back by `load_jsonl`, and meant to be edited."""
    lines = []
    for example in examples:
        record: dict[str, Any] = {"input": example.input}
        if example.output is not None:
            record["output"] = example.output
        record |= {"kind": example.kind, "position": round(example.position, 4), "source": example.source}
        if example.cut:
            record["cut"] = True
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    replace_file(path, lambda target: target.write_text("".join(lines), encoding="utf-8"))


def load_jsonl(path: Path) -> list[Example]:
    """Read {"input", "output"?} lines; kind, position and source are kept where they stand. Raises
    DataError."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise DataError(f"{path.name}: not a UTF-8 text file") from None
    examples = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            examples.append(_parse(line, f"{path.name}, line {number}"))
        if len(examples) > MAX_EXAMPLES:
            raise DataError(f"{path.name}: more than {MAX_EXAMPLES} questions")
    if not examples:
        raise DataError(f"{path.name}: there are no questions in it")
    return examples


def _parse(line: str, where: str) -> Example:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not valid JSON ({error})") from None
    if not isinstance(record, dict):
        raise DataError(f'{where}: expected an object such as {{"input": "…"}}')
    if unknown := set(record) - _FIELDS:
        raise DataError(f"{where}: unknown field {sorted(unknown)[0]!r}; known are {', '.join(sorted(_FIELDS))}")
    for name in ("input", "output", "kind", "source"):
        value = record.get(name)
        if name == "input" or value is not None:
            if not isinstance(value, str) or not value.strip():
                raise DataError(f"{where}: {name} must be a text that is not empty")
            if len(value) > MAX_TEXT:
                raise DataError(f"{where}: {name} is longer than {MAX_TEXT} characters")
    position = record.get("position", 0.0)
    if isinstance(position, bool) or not isinstance(position, int | float) or not 0 <= position <= 1:
        raise DataError(f"{where}: position must be a number from 0 to 1")
    if not isinstance(record.get("cut", False), bool):
        raise DataError(f"{where}: cut must be true or false")
    return Example(
        record["input"],
        record.get("output"),
        record.get("kind") or "user",
        float(position),
        record.get("source") or "user",
        record.get("cut", False),
    )


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


class Deduplicator:
    """Says which questions are worth keeping: not empty, no echo of a sentence of the context, not nearly
    asked."""

    def __init__(self, context: str, threshold: float = 0.8) -> None:
        self._context = " ".join(words_of(context))
        self._title = set(words_of(title(context)))
        self._threshold = threshold
        self._seen: list[frozenset[str]] = []
        self._index: dict[str, list[int]] = {}

    def add(self, question: str) -> bool:
        words = words_of(question)
        if len(words) < 2 or len(question) > 400:
            return False
        if len(words) > 3 and " ".join(words) in self._context:
            return False
        content = frozenset(word for word in words if word not in self._title) or frozenset(words)
        rivals = {index for word in content for index in self._index.get(word, ())}
        for index in rivals:
            other = self._seen[index]
            if len(content & other) >= self._threshold * len(content | other):
                return False
        for word in content:
            self._index.setdefault(word, []).append(len(self._seen))
        self._seen.append(content)
        return True


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
        if kept.add(example.input):
            merged.append(example)
    return merged


def split(examples: Sequence[Example], held_out: int, seed: int = 0) -> tuple[list[Example], list[Example]]:
    """(training, held out): whole (kind, place) cells are held out, so that no kind of question about a place
    of the context is on both sides, while every kind and every place is on both; of so few questions that this
    cannot be, some. The user's are never held out."""
    own = [example for example in examples if _may_be_held_out(example)]
    wanted = min(held_out, len(own) // 3)
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
    """Not the user's, and to be answered by the model: a recitation is no gold answer to measure against."""
    return example.source != "user" and example.output is None


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
    """The same examples, `count` of them that are spread evenly over all come first."""
    chosen = dict.fromkeys(index * len(examples) // count for index in range(count)) if count < len(examples) else {}
    return [examples[index] for index in chosen] + [e for index, e in enumerate(examples) if index not in chosen]
