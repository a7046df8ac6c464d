"""Questions filled in from a context without a model: seed kinds over its sections, sentences and key
phrases."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence

from softbatch.prompt_store.compression.data.language import (
    beginning,
    clauses,
    is_english,
    is_latin,
    is_question,
    question_mark,
    without_end,
)
from softbatch.prompt_store.compression.data.phrases import Sentence, headings, key_phrases, plain, sentences, title

# kind -> templates; {p} a key phrase, {o} another one from nearby, {s} a section, {q} a quoted fragment.
_PHRASE: dict[str, tuple[str, ...]] = {
    "fact": (
        "What is {p}?",
        "What does the document say about {p}?",
        "Tell me about {p}.",
        "What should I know about {p}?",
        "What are the rules for {p}?",
        "Which limits apply to {p}?",
        "When does {p} apply, and when does it not?",
        "I have heard about {p}. What is it for, and who uses it?",
    ),
    "explain": (
        "Explain {p}.",
        "Explain {p} in simple words.",
        "Why is {p} needed?",
        "What is the purpose of {p}?",
        "Why does {p} matter for {o}?",
    ),
    "how_to": (
        "How does {p} work?",
        "How do I use {p}?",
        "What must I do about {p}?",
        "How can I change {p}?",
        "What are the steps for {p}, and what comes after them?",
        "I want to do something with {p} and {o}. How should I go about it?",
    ),
    "list": ("List everything about {p}.", "Name three things about {p}.", "Which kinds of {p} are there?"),
    "compare": (
        "What is the difference between {p} and {o}?",
        "Compare {p} and {o}.",
        "How are {p} and {o} related?",
        "How does {p} differ from {o}, and which one do I need?",
    ),
    "use_case": (
        "Give an example of when {p} matters.",
        "When would somebody need {p}?",
        "I have a problem with {p}. What can I do?",
        "Who is affected by {p}?",
        "A colleague has a question about {p}. What would you tell them?",
        "Somebody is unsure about {p} because of {o}. What should they do?",
    ),
}
# About the document as a whole, and how a conversation begins.
GENERAL: tuple[str, ...] = (
    "What is this document about?",
    "Summarise the document.",
    "Who is this document for?",
    "What can you help me with?",
    "List the most important points.",
    "Hello!",
    "Who are you?",
    "Give me three facts from the document.",
    "What are the main topics?",
    "What should I read first?",
    "Write one paragraph about the document.",
    "What are the most important numbers and limits?",
    "How does this document begin, and how does it end?",
)
_SECTION: tuple[str, ...] = (
    "Summarise the section about {s}.",
    "What are the main points on {s}?",
    "Give a short overview of {s}.",
    "Describe {s} in two sentences.",
    "List the points under {s}.",
    "Name everything that belongs to {s} and say what each is for.",
    "What does the document say about {s}?",
    "Which items are given under {s}, and what do they mean?",
    "Explain {s} step by step.",
    "What are the rules and limits for {s}?",
)
_QUOTE: tuple[str, ...] = (
    'What does "{q}" mean?',
    'Explain this: "{q}".',
    'The document mentions "{q}". What does it say about that?',
    'Why does it say "{q}"?',
)
_AUXILIARIES = "is|are|was|were|can|could|may|must|will|would|should|has|have"
_INVERTIBLE = re.compile(
    rf"^((?:(?:a|an|the|this|each|every|any|all|one|two|your|our)\s)?[\w'’/-]+(?:\s[\w'’/-]+){{0,4}}?)\s"
    rf"({_AUXILIARIES})\s(.+)$",
    re.IGNORECASE,
)
_CONDITION = re.compile(r"\b(?:if|when|unless|once)\s+([^,.;:|]{8,70})", re.IGNORECASE)
_PURPOSE = re.compile(
    r"(?:^|,\s|\bhow\s|\b(?:is|are|used|need|want|wish)\s)to\s+([a-z]{3,}\s[^,.;:|()]{4,60})", re.IGNORECASE
)
_NOT_A_VERB_WORDS = """
the your its our their this that these those each every any all some both one two
"""
_NOT_A_VERB = frozenset(_NOT_A_VERB_WORDS.split())
_NOT_IN_A_SUBJECT_WORDS = """
it they this that these those there he she we you i and or but which who to if when unless once after before while
because what how why
"""
_NOT_IN_A_SUBJECT = frozenset(_NOT_IN_A_SUBJECT_WORDS.split())
# At most so many questions for each key phrase: a text with few sentences and sections has little else to ask about.
REPEATS = 12
_BEING = frozenset(("is", "are", "was", "were", "has", "have"))
_ASK_OF_BEING = ("", "Why", "When")
_ASK_OF_DOING = ("", "How", "Why", "When", "In what case")
_LONGEST_CLAUSE = 16
Asked = tuple[str, str, float]


def questions_from(text: str, rng: random.Random) -> Iterator[Asked]:
    """(question, kind, position) without end in sight of the templates: cycles over the kinds, and within
    each kind over the whole context in an even order, so that any first k of them cover it."""
    found, name = sentences(text), title(text)
    english = is_english(text)
    known = [sentence for sentence in found if english and is_latin(sentence.text)]
    unknown = [sentence for sentence in found if not (english and is_latin(sentence.text))]
    streams = [_cycled(own_questions(found, text), rng), _cycled(neutral_questions(unknown), rng)]
    weights = [3, 8]
    if english:
        rewritten = _rewritten(known, rng)
        streams += [
            _cycled(rewritten, rng),
            _cycled(list(_compound(_rewritten(known, rng))), rng),
            _cycled(list(_quoted(known, rng)), rng),
            _cycled(list(_about_phrases(text, rng)), rng),
            _cycled(list(_about_sections(text)), rng),
        ]
        weights += [8, 3, 3, 7, 3]
    live = list(zip(streams, weights, strict=True))
    while live:
        for stream, weight in list(live):
            for _ in range(weight):
                item = next(stream, None)
                if item is None:
                    live.remove((stream, weight))
                    break
                question, kind, position = item
                named = english and kind not in ("own", "continue") and is_latin(question)
                yield _named(question, name, rng) if named else question, kind, position


def own_questions(found: Sequence[Sentence], text: str) -> list[Asked]:
    """What the document asks itself, as lists of frequent questions do, in sentences and in headings."""
    asked = [(sentence.text, "own", sentence.position) for sentence in found if is_question(sentence.text)]
    heads = [(plain(head), "own", at / max(1, len(text))) for at, head in headings(text) if is_question(head)]
    return sorted({*asked, *heads}, key=lambda item: (item[2], item[0]))


def neutral_questions(found: Sequence[Sentence]) -> list[Asked]:
    """Of sentences in a language that no templates are known for: parts of each, quoted, asked about, to go on from.
    Nothing but the sentence's own words and marks is in them."""
    asked: list[Asked] = []
    for sentence in found:
        mark = question_mark(sentence.text)
        for clause in clauses(sentence.text, 8):
            asked.append((without_end(clause) + mark, "quote", sentence.position))
        for words in (3, 6):
            asked.append((without_end(beginning(sentence.text, words)) + "…", "continue", sentence.position))
    return asked


def _cycled(items: Sequence[tuple[str, str, float]], rng: random.Random) -> Iterator[tuple[str, str, float]]:
    """The items in passes over the whole context: each pass takes one item from each of its sixteen parts."""
    parts: list[list[tuple[str, str, float]]] = [[] for _ in range(16)]
    for item in items:
        parts[min(15, int(item[2] * 16))].append(item)
    for part in parts:
        rng.shuffle(part)
    while any(parts):
        for part in parts:
            if part:
                yield part.pop()


def _named(question: str, name: str, rng: random.Random) -> str:
    """The question, made to stand alone in half of the cases by naming the document it is about."""
    if not name or name.lower() in question.lower() or "document" in question or rng.random() < 0.5:
        if name and "the document" in question and rng.random() < 0.5:
            return question.replace("the document", name, 1)
        return question
    if rng.random() < 0.5:
        return f"I have a question about {name}. {question}"
    return f"{name}: {question}"


def _rewritten(found: Sequence[Sentence], rng: random.Random) -> list[tuple[str, str, float]]:
    """Statements turned into questions: the auxiliary goes to the front, conditions and purposes are asked
    for."""
    asked: list[tuple[str, str, float]] = []
    for sentence in found:
        text = sentence.text.rstrip(".!;:")
        condition = _CONDITION.search(text)
        if condition:
            clause = condition.group(1).strip()
            form = rng.choice(("What happens if {}?", "What should I do if {}?", "What if {}?"))
            asked.append((form.format(clause), "condition", sentence.position))
        purpose = _PURPOSE.search(text)
        if purpose and purpose.group(1).split()[0] not in _NOT_A_VERB:
            form = rng.choice(("How do I {}?", "How can I {}?", "What do I need to {}?"))
            asked.append((form.format(purpose.group(1).strip()), "how_to", sentence.position))
        if "|" in text:
            cells = [cell.strip() for cell in text.split("|") if len(cell.strip()) > 2]
            if cells:
                cell = rng.choice(cells[:2])
                form = rng.choice(("What does {} mean?", "What is {}?", "What do I do about {}?"))
                asked.append((form.format(cell), "fact", sentence.position))
        match = _INVERTIBLE.match(text)
        if match and "|" not in text:
            subject, verb, rest = match.groups()
            clause = re.split(r"[,;:(]", rest)[0].split()
            if len(clause) <= _LONGEST_CLAUSE and not _NOT_IN_A_SUBJECT & set(subject.lower().split()):
                asked.append((_inverted(subject, verb.lower(), " ".join(clause), rng), "fact", sentence.position))
    return asked


def _inverted(subject: str, verb: str, clause: str, rng: random.Random) -> str:
    """A question of a statement: its auxiliary goes in front of its subject."""
    first = subject.split()[0]
    if first == "A" or (not first.isupper() and first[1:].islower()):
        subject = subject[0].lower() + subject[1:]
    start = rng.choice(_ASK_OF_BEING if verb in _BEING else _ASK_OF_DOING)
    question = f"{start} {verb} {subject} {clause}?".strip()
    return question[0].upper() + question[1:]


def _compound(asked: Sequence[tuple[str, str, float]]) -> Iterator[tuple[str, str, float]]:
    """Two neighbouring questions as one."""
    for (first, _, position), (second, _, _) in zip(asked[::2], asked[1::2], strict=False):
        yield f"{first[:-1]}, and {second[0].lower()}{second[1:]}", "compound", position


def _quoted(found: Sequence[Sentence], rng: random.Random) -> Iterator[tuple[str, str, float]]:
    """A fragment of each sentence, several of a long one."""
    for index, sentence in enumerate(found):
        words = sentence.text.split()
        for part in range(max(1, len(words) // 16)):
            length = min(len(words), rng.randint(5, 10))
            start = rng.randint(0, len(words) - length)
            fragment = " ".join(words[start : start + length]).strip(" |.,;:\"'")
            yield _QUOTE[(index + part) % len(_QUOTE)].format(q=fragment), "quote", sentence.position


def _about_phrases(text: str, rng: random.Random) -> Iterator[tuple[str, str, float]]:
    phrases = [found for found in key_phrases(text) if is_latin(found[0])]
    kinds = [kind for kind in _PHRASE for _ in range(4 if kind == "fact" else 1)]
    for index, (phrase, position) in enumerate(phrases):
        for repeat in range(REPEATS):
            kind = kinds[(index + repeat * 3) % len(kinds)]
            other = phrases[max(0, min(len(phrases) - 1, index + rng.choice((-3, -2, 2, 3))))][0]
            if other == phrase:
                continue
            yield rng.choice(_PHRASE[kind]).format(p=phrase, o=other), kind, position


def _about_sections(text: str) -> Iterator[tuple[str, str, float]]:
    for index, (at, name) in enumerate(headings(text)):
        if is_question(name) or not is_latin(name):
            continue
        for repeat in range(5):
            form = _SECTION[(index + repeat * 2) % len(_SECTION)]
            yield form.format(s=plain(name)), "summarise", at / max(1, len(text))
