"""What a context talks about: its sections, sentences, key phrases and title, found without any model."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from softbatch.prompt_store.compression.data.language import split_sentences, words_of

_HEADING = re.compile(r"^\s{0,3}#{1,6}\s+(.+?)\s*#*$|^([^\n]{3,80})\n(?:=+|-{3,})\s*$", re.MULTILINE)
_NUMBERING = re.compile(r"^(?:(?:chapter|section|part|article)\s+)?[\dIVX]+(?:\.\d+)*[.):]?\s+", re.IGNORECASE)
_BULLET = re.compile(r"^\s*(?:[-*+•]|\d+[.)])\s+")
_CODE = re.compile(r"`([^`\n]{2,40})`")
_CAPITALISED = re.compile(r"\b(?:[A-Z][\w'’-]*[A-Za-z0-9]|[A-Z]{2,}[\w-]*)(?:\s+(?:of\s+|and\s+)?[A-Z0-9][\w'’-]*)*")
_QUANTITY = re.compile(
    r"(?<![\w.])(?:[A-Z]{3}\s|[$€£])?\d[\d,.]*(?:\s?(?:%|°[CF]|[A-Za-z/µ]{1,10}))(?:\s[a-z]{3,12})?(?!\.\w)"
)
_WORD = re.compile(r"[^\W\d_][\w'’-]*")
_STOP_WORDS = """
a about above after again all also am an and any are as at be because been before being below between both but
by can cannot could did do does doing down during each either else every few for from further get gets had has
have having he her here hers him his how however i if in into is it its itself just least less like made make
makes many may me might more most much must my neither never no nor not now of off on once one only or other our
out over own per same shall she should since so some still such take than that the their them then there these
they this those three through to too two under until up upon us use used uses using very was we were what when
where whether which while who whom whose why will with within without would yes yet you your
"""
_STOP = frozenset(_STOP_WORDS.split())


@dataclass(frozen=True)
class Sentence:
    """A sentence, list item or table row; `position` in [0, 1) is its place in the context."""

    text: str
    section: str
    position: float


def plain(text: str) -> str:
    """The text without Markdown's marks and doubled spaces."""
    return re.sub(r"\s+", " ", re.sub(r"\*{1,3}|`|(?<!\w)_(?=\w)|(?<=\w)_(?!\w)", "", text)).strip()


def headings(text: str) -> list[tuple[int, str]]:
    """(offset, heading) of every Markdown heading, its number taken off."""
    found = []
    for match in _HEADING.finditer(text):
        name = _NUMBERING.sub("", plain(match.group(1) or match.group(2)))
        if name:
            found.append((match.start(), name))
    return found


def title(text: str) -> str:
    """The context's name: its first heading or short first line, up to a colon or comma; "" when it has
    none."""
    marked = headings(text)
    first = next((line.strip() for line in text.splitlines() if line.strip()), "")
    if marked and marked[0][0] <= len(text) - len(text.lstrip()) + 1:
        first = marked[0][1]
    elif len(first) > 80 or first.endswith((".", "!", "?")):
        return ""
    return re.split(r"[:,;|]|\s[–—-]\s", plain(first))[0].strip()[:60]


def sentences(text: str) -> list[Sentence]:
    """Every sentence of the context in order; code fences are left out, table rows and list items are
    kept."""
    marked = headings(text)
    found: list[Sentence] = []
    offset, fenced, paragraph, start = 0, False, "", 0

    def flush() -> None:
        nonlocal paragraph
        section = next((name for at, name in reversed(marked) if at <= start), "")
        at = start
        for part in split_sentences(paragraph):
            words = plain(part).strip(" |")
            if len(words_of(words)) >= 3:
                found.append(Sentence(words, section, min(at, len(text) - 1) / max(1, len(text))))
            at += len(part) + 1
        paragraph = ""

    for line in text.splitlines(keepends=True):
        stripped = line.strip()
        if stripped.startswith(("```", "~~~")):
            flush()
            fenced = not fenced
        elif fenced or not stripped or re.match(r"^(?:#{1,6}\s|[|:\s-]+$|=+$)", stripped):
            flush()
        elif stripped.startswith("|"):
            flush()
            start = offset
            paragraph = " | ".join(cell.strip() for cell in stripped.strip("|").split("|"))
            flush()
        else:
            if _BULLET.match(line):
                flush()
            if not paragraph:
                start = offset
            paragraph += (" " if paragraph else "") + _BULLET.sub("", stripped)
        offset += len(line)
    flush()
    return found


def key_phrases(text: str) -> list[tuple[str, float]]:
    """(phrase, position) of what the text is about: code spans, capitalised terms, quantities and frequent
    runs of words without a function word; each once, at its first place, in the order of the text."""
    found: dict[str, tuple[str, float]] = {}

    def add(phrase: str, at: int) -> None:
        phrase = plain(phrase).strip(" .,:;!?()[]\"'|")
        words = phrase.split()
        while words and words[-1].lower() in _STOP:
            words.pop()
        phrase = " ".join(words)
        if 2 < len(phrase) <= 60 and phrase.lower() not in _STOP:
            found.setdefault(phrase.lower(), (phrase, at / max(1, len(text))))

    for match in _CODE.finditer(text):
        add(match.group(1), match.start())
    for match in _CAPITALISED.finditer(text):
        before = text[: match.start()].rstrip(" *_`\"'(#|-")
        starts_sentence = not before or before[-1] in ".!?:;\n"
        if not starts_sentence or " " in match.group() or not match.group()[1:].islower():
            add(match.group(), match.start())
    for match in _QUANTITY.finditer(text):
        add(match.group(), match.start())
    for phrase, at in _frequent_runs(text):
        add(phrase, at)
    return sorted(found.values(), key=lambda item: item[1])


def _frequent_runs(text: str) -> list[tuple[str, int]]:
    """Runs of one to three content words: pairs and triples always, single words when they come back."""
    runs: list[list[tuple[str, int, int]]] = [[]]
    for match in _WORD.finditer(text):
        last = runs[-1][-1] if runs[-1] else None
        if match.group().lower() in _STOP or (last and text[last[2] : match.start()] not in (" ", "-")):
            runs.append([])
        if match.group().lower() not in _STOP:
            runs[-1].append((match.group().lower(), match.start(), match.end()))
    counts = Counter(word for run in runs for word, _, _ in run)
    found: list[tuple[str, int]] = []
    for run in runs:
        if 2 <= len(run) <= 3:
            found.append((text[run[0][1] : run[-1][2]], run[0][1]))
        found.extend((word, at) for word, at, _ in run if counts[word] >= 2 and len(word) > 3)
    return found


def evenly(items: Sequence[tuple[str, float]], count: int) -> list[tuple[str, float]]:
    """`count` of the items, spread evenly over their order; all of them when there are fewer."""
    if len(items) <= count:
        return list(items)
    return [items[index * len(items) // count] for index in range(count)]
