"""Words, sentences and question marks of any script, by Unicode's properties; no language is known but English."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable

import regex

# Scripts that put no spaces between words: a word is then a character.
_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}"
_WORD = regex.compile(rf"[{_UNSPACED}]\p{{M}}*|[^\W{_UNSPACED}]+")
_UNSPACED_TEXT = regex.compile(rf"[{_UNSPACED}]")
_LETTER = regex.compile(r"\p{L}")
_LATIN = regex.compile(r"\p{Latin}")
# What ends a sentence wherever it stands: Unicode's sentence terminals but for the Latin ones, which need a space.
_TERMINAL = r"[\p{STerm}\u0964\u0965\u061f\u037e\u2026--[.!?]]"
# Bounded, as is all that is looked back at: a text of brackets costs no more than another.
_CLOSING = r"[\p{Pe}\p{Pf}\u201d\u2019\"']{0,4}"
_FULL_STOP = rf"(?<={_TERMINAL}{_CLOSING})(?!{_TERMINAL}|[\p{{Pe}}\p{{Pf}}\"'])\s*"
_SPACE_IN_UNSPACED = r"(?<=[\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]\p{M}{0,3})[ \u200b]+"
_SENTENCE_END = regex.compile(
    rf"(?V1)(?<=[.!?:;])[\"')\]\p{{Pf}}]{{0,8}}\s+(?=[\"'(\[`*]{{0,8}}[\p{{Lu}}\p{{Lo}}0-9`])|{_FULL_STOP}|{_SPACE_IN_UNSPACED}"
)
PASSAGE_END = regex.compile(rf"(?V1)(?<=[.!?:;|])\s+|\n+|{_FULL_STOP}|{_SPACE_IN_UNSPACED}")
_OPEN_END = regex.compile(r"[\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Nd}]\p{M}*$")
_SHORT_PIECE = 40
_COMMA = regex.compile(r"[,，、،;；؛:：()（）\[\]|—–]+\s*")
_GAP = regex.compile(r"[,，、;；:：()（）\[\]|—–\s]+")
_SHORTEST_CLAUSE = 3  # words
_END = regex.compile(r"(?V1)[\p{STerm}\s.,;:!?、，；：！？…]")
_QUESTION = regex.compile(r"[?\uff1f\u061f\u037e\u055e\u1367\u2cfa]")
_QUESTION_MARKS = {"Han": "？", "Hiragana": "？", "Katakana": "？", "Arabic": "؟", "Greek": ";", "Armenian": "՞"}
# Words that stand in nearly every English text and in few others.
_ENGLISH_WORDS = """
the and of to that for with are this you by from have it which not be can if when
"""
_ENGLISH = frozenset(_ENGLISH_WORDS.split())
_ENGLISH_QUESTION = _ENGLISH | {"what", "how", "why", "who", "where", "does", "do"}
_ENGLISH_SHARE = 0.08
_SHORT_TEXT = 30  # words; fewer say little about a language
_SHORTEST_TEXT = 12  # words; fewer may well have none of the commonest


def words_of(text: str) -> list[str]:
    """Lower-case words; of a script without spaces its characters."""
    found: list[str] = _WORD.findall(text.lower())
    return found


def split_sentences(text: str) -> list[str]:
    """The sentences of one paragraph. A script that ends them with spaces puts spaces inside them as well: there short
    pieces are joined."""
    found: list[str] = []
    for part in _SENTENCE_END.split(text):
        if not part or part.isspace():
            continue
        if found and len(found[-1]) < _SHORT_PIECE and _OPEN_END.search(found[-1]):
            found[-1] = f"{found[-1]} {part}"
        else:
            found.append(part)
    return found


def is_unspaced(text: str) -> bool:
    """Whether most of its letters belong to scripts without spaces between words."""
    return 2 * _count(_UNSPACED_TEXT, text) > _count(_LETTER, text)


def _count(pattern: regex.Pattern[str], text: str) -> int:
    """Of a long text without a list of its letters."""
    return sum(1 for _ in pattern.finditer(text))


def is_latin(text: str) -> bool:
    """Whether most of its letters are Latin ones; a text without letters counts as such."""
    return 2 * _count(_LATIN, text) >= _count(_LETTER, text)


def is_english(text: str) -> bool:
    """By its commonest words; a very short text in ASCII is taken for English."""
    words = words_of(text)
    if not is_latin(text):
        return False
    if len(words) < _SHORT_TEXT:
        is_plain = len(words) < _SHORTEST_TEXT and text.isascii()
        return is_plain or any(word in _ENGLISH for word in words)
    counts = Counter(words)
    return sum(counts[word] for word in _ENGLISH) >= _ENGLISH_SHARE * len(words)


def language_check(text: str) -> Callable[[str], bool]:
    """Whether a question may be in the text's language: of its script, and in English for an English text alone. The
    text, which may be long, is read once."""
    latin = is_latin(text)
    any_words = not latin or is_english(text)

    def is_of_language(question: str) -> bool:
        return is_latin(question) == latin and (any_words or not _ENGLISH_QUESTION & set(words_of(question)))

    return is_of_language


def is_question(text: str) -> bool:
    """Whether a question mark of any script stands at its end."""
    return bool(_QUESTION.match(text.rstrip().rstrip("\"'”’」』)")[-1:]))


def question_mark(text: str) -> str:
    """The one that the text's script uses."""
    for script, mark in _QUESTION_MARKS.items():
        if regex.search(rf"\p{{{script}}}", text) and not is_latin(text):
            return mark
    return "?"


def without_end(text: str) -> str:
    """Without what a sentence or a part of one ends in, in any script, so that something else may end it."""
    end = len(text)
    while end and _END.match(text[end - 1]):
        end -= 1
    return text[:end]


def beginning(text: str, words: int) -> str:
    """About its first `words` words; of a script without spaces twice as many characters."""
    if not is_unspaced(text):
        return " ".join(text.split()[:words])
    characters = regex.findall(r"\X", re.sub(r"\s+", " ", text))
    return "".join(characters[: 2 * words]).strip()


def clauses(text: str, words: int) -> list[str]:
    """A sentence's parts between its commas and colons, each cut to about `words` words; of a script that writes none
    between its spaces."""
    found = [part.strip() for part in (_GAP if is_unspaced(text) else _COMMA).split(text)]
    return [beginning(part, words) for part in found if len(words_of(part)) >= _SHORTEST_CLAUSE]
