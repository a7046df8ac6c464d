"""What a context says that has one right answer: a number, a name, a cell of a table, and the sentence it stands in.

Told apart by the form of words alone, in any language: what holds digits, marks or capitals is what users ask for
exactly, and what a model with the whole context in front often does not find.
"""

from __future__ import annotations

import random
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import regex

from softbatch.prompt_store.compression.data.accepted import contains
from softbatch.prompt_store.compression.data.examples import MAX_ACCEPTED, PLACES, Example
from softbatch.prompt_store.compression.data.language import (
    is_english,
    is_question,
    is_unspaced,
    language_check,
    words_of,
)
from softbatch.prompt_store.compression.data.passages import Passage, cut, table_heads
from softbatch.prompt_store.compression.data.phrases import Sentence, headings, plain, sentences, title

KIND = "detail"  # asked in words of the model
GAP = "gap"  # the sentence itself, its answer left out
MOST_OF_A_SENTENCE = 4
_LONGEST_CELL = 8  # words
# A word that makes up so much of a text, and stands there so often, is one of its grammar.
_COMMON_SHARE = 0.008
_COMMON_TIMES = 3
_LONGEST_QUESTION = 300
_UNIT = r"(?:\s?(?:%|°\p{L}?|\p{Han}{1,2}|(?!\p{Han})\p{L}{1,14}\b))?"
_QUANTITY = regex.compile(
    rf"(?<![\p{{Latin}}\p{{Cyrillic}}\p{{Greek}}\p{{N}}_.-])\p{{Sc}}?\p{{N}}+(?:[.,:/'’-]\p{{N}}+)*{_UNIT}"
)
_NUMBER = regex.compile(r"\p{N}+(?:[.,:/'’-]\p{N}+)*")
_TOKEN = regex.compile(r"[^\s|,;()\[\]\"“”„«»、。，；（）]+")
_ENDS = ".,;:!?'’`…"
# A word that is written as no other word of its language is: max_draft, X-Quay-Key, /v2/items, WS-4, berthKind, HTTP.
_NAME = regex.compile(r"\p{L}[_/@#=.-]\p{L}|[_/@#-]{1,2}\p{L}|\p{L}-?\p{N}|\p{N}\p{L}|\p{Ll}\p{Lu}|\p{Lu}\p{Lu}")
_CAPITALISED = regex.compile(r"(?<=[^\s.!?:|]\s)\p{Lu}[\p{L}\p{M}'’-]+(?:\s\p{Lu}[\p{L}\p{M}'’-]+)*")
_QUOTED = regex.compile(r"[\"“„«「]([^\"“”„«»「」]{2,60})[\"”“»」]")
_CODE = re.compile(r"`([^`\n]{1,60})`")


@dataclass(frozen=True)
class Fact:
    """`answer` as it stands in the sentence; "" where the sentence has none that stands out. `passage` can be read
    alone and holds the sentence; `beside` are the other answers in the sentence, then those in the passage."""

    answer: str
    sentence: Sentence
    passage: Passage
    beside: tuple[str, ...] = ()

    def accept(self, question: str) -> tuple[str, ...]:
        """What an answer contains that is right. A model that is told to ask for one thing often asks for another of
        the same passage, so it may be any that the question does not hold itself; a number also without its unit."""
        found = dict.fromkeys(form for one in (self.answer, *self.beside) for form in _forms(one))
        return tuple(one for one in found if not contains(question, one))[:MAX_ACCEPTED]


def _forms(answer: str) -> Iterator[str]:
    if answer:
        yield answer
    number = _NUMBER.search(answer)
    if number is not None and _QUANTITY.fullmatch(answer) and number.group() != answer:
        yield number.group()


def facts_of(text: str, seed: int = 0) -> list[Fact]:
    """All that stand out, in an order whose every beginning is spread over the whole text."""
    pieces, heads = cut(text), {_compact(head) for _, _, head in table_heads(text)}
    if not pieces:
        return []
    begins, marked, common = [piece.start for piece in pieces], _marked(text), _common(text)
    name = title(text).casefold() if headings(text) else ""
    rng, places = random.Random(f"{seed}:facts"), [list[Fact]() for _ in range(PLACES)]
    of_passage: dict[int, list[str]] = {}
    known: list[tuple[Sentence, int, list[str]]] = []
    for sentence in sentences(text):
        if _compact(sentence.text) not in heads:
            passage = max(0, bisect_right(begins, round(sentence.position * len(text))) - 1)
            found = [one for one in answers_in(sentence.text, marked, common) if one.casefold() not in name]
            of_passage.setdefault(passage, []).extend(found)
            known.append((sentence, passage, found))
    for sentence, passage, found in known:
        beside = (*found, *of_passage[passage])
        asked = rng.sample(found, MOST_OF_A_SENTENCE) if len(found) > MOST_OF_A_SENTENCE else found or [""]
        places[min(PLACES - 1, int(sentence.position * PLACES))] += [
            Fact(one, sentence, pieces[passage], beside) for one in asked
        ]
    for part in places:
        rng.shuffle(part)
    # Neighbouring places come far from each other.
    ranked = [
        ((rank + 0.5) / len(part), 5 * at % PLACES, fact)
        for at, part in enumerate(places)
        for rank, fact in enumerate(part)
    ]
    return [fact for _, _, fact in sorted(ranked, key=lambda item: item[:2])]


def _compact(row: str) -> str:
    return re.sub(r"\s*\|\s*", "|", plain(row)).strip("| ")


def _marked(text: str) -> set[str]:
    """What is set as code wherever it stands: `from` is that in some texts, but a word like others in most places."""
    words = Counter(token.strip(f"`{_ENDS}") for token in _TOKEN.findall(text))
    return {word for word, count in Counter(_CODE.findall(text)).items() if 2 * count > words[word]}


def _common(text: str) -> set[str]:
    """The commonest words, which are no units."""
    words = words_of(text)
    least = max(_COMMON_TIMES, _COMMON_SHARE * len(words))
    return {word for word, count in Counter(words).items() if count >= least}


def answers_in(sentence: str, marked: set[str], common: set[str]) -> list[str]:
    """The parts of a sentence that could each be what somebody asks for, of `marked` words and by form."""
    found: dict[str, str] = {}
    for answer in _candidates(sentence, marked, common):
        answer = answer.strip().strip("`")
        if answer and answer != sentence and words_of(answer):
            found.setdefault(answer.casefold(), answer)
    return list(found.values())


def _candidates(sentence: str, marked: set[str], common: set[str]) -> Iterator[str]:
    if " | " in sentence:
        yield from (cell for cell in sentence.split(" | ") if len(cell.split()) <= _LONGEST_CELL)
        return
    for match in _QUANTITY.finditer(sentence):
        unit = words_of(match.group())[-1:]
        number = _NUMBER.search(match.group()) if common.intersection(unit) else None
        yield number.group() if number else match.group()
    for token in () if is_unspaced(sentence) else _TOKEN.findall(sentence):
        word = token.strip(_ENDS)
        if word in marked or _NAME.search(word):
            yield word
    yield from (match.group(1) for match in _QUOTED.finditer(sentence))
    yield from (match.group() for match in _CAPITALISED.finditer(sentence))


_ASK_FOR = 'Write one short question about "{sentence}" whose answer is "{answer}". Write the question alone.'
_ASK_ABOUT = 'Write one short question that is answered by "{sentence}". Write the question alone.'
_IN_ITS_LANGUAGE = " Write it in the language of the text."


def request_for(fact: Fact, english: bool) -> str:
    """What the model is told so that it asks for a fact; passages come first, so that what they share is computed
    once."""
    form = _ASK_FOR if fact.answer else _ASK_ABOUT
    wanted = form.format(sentence=fact.sentence.text[:_LONGEST_QUESTION], answer=fact.answer)
    return f"{fact.passage.text}\n\n{wanted}{'' if english else _IN_ITS_LANGUAGE}"


def fact_questions(text: str, replies: Sequence[tuple[Fact, str]], seed: int = 0) -> list[Example]:
    """One for each reply to `request_for` that is a question; of the others the sentence, its answer left out."""
    of_language, rng, name = language_check(text), random.Random(seed), title(text)
    english, asked, found = is_english(text), set[str](), list[Example]()
    for fact, reply in replies:
        question = _first_question(reply)
        usable = bool(question) and of_language(question)
        if usable:
            known = not english or not name or name.casefold() in question.casefold()
            example = Example(question if known or rng.random() < 0.5 else f"{name}: {question}", None, KIND)
        elif fact.answer:
            example = Example(_gap(fact), fact.sentence.text, GAP, cut=True)
        else:
            continue
        if (key := " ".join(words_of(example.input))) in asked or not key:
            continue
        asked.add(key)
        found.append(
            Example(
                example.input,
                example.output,
                example.kind,
                min(fact.sentence.position, 0.9999),
                "model" if usable else "template",
                example.cut,
                fact.accept(example.input),
                fact.passage.text,
            )
        )
    return found


def _first_question(reply: str) -> str:
    """ "" where there is none."""
    for line in reply.splitlines():
        line = plain(re.sub(r"^\s*(?:[-*•]|\d+[.):]|\w+:)\s*", "", line)).strip(" \"'“”„«»")
        if is_question(line) and len(words_of(line)) > 2 and len(line) <= _LONGEST_QUESTION:
            return line
    return ""


def _gap(fact: Fact) -> str:
    section = f"{fact.sentence.section}: " if fact.sentence.section else ""
    return f"{section}{fact.sentence.text.replace(fact.answer, '…')}"
