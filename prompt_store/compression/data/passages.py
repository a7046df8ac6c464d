"""How a text is cut into passages: whole lines and sentences, none so long that a question could not hold it.

Recitations in training, retrieval in reports and recall in serving all take their passages from here.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from softbatch.prompt_store.compression.data.language import PASSAGE_END, is_unspaced, words_of
from softbatch.prompt_store.compression.data.phrases import headings

# Characters of a passage that is looked up, at least; of a script where each is a word fewer.
LENGTH = 220
UNSPACED_LENGTH = 60
_LONGEST = 4  # times as long as asked for, then it is cut between words, or anywhere
_SPACE = re.compile(r"\s*")


@dataclass(frozen=True)
class Passage:
    """A piece of a text that can be read alone. `text` begins with the heading that it stands under and, if it is rows
    of a table, the table's head; `start` and `end` are the place of the piece itself, in characters."""

    text: str
    start: int
    end: int


def passages(text: str, length: int, whole_rows: bool = False) -> list[tuple[int, str]]:
    """(offset, passage): the whole text cut at ends of lines and sentences into pieces of at least `length`
    characters, headings left out. With `whole_rows` no row of a table is cut."""
    found: list[tuple[int, str]] = []
    starts = [0, *_ends(text, whole_rows), len(text)]
    lines = [0, *(match.end() for match in re.finditer("\n", text))]
    heads = {at for at, _ in headings(text)}
    begin: int | None = None
    for start, end in pairwise(starts):
        line = lines[bisect_right(lines, start) - 1]
        if text[line : line + 8].lstrip().startswith("#") or line in heads:
            if begin is not None and text[begin:start].strip():
                found.append((begin, text[begin:start].strip()))
            begin = None
            continue
        begin = start if begin is None else begin
        if end - begin >= length:
            found.append((begin, text[begin:end].strip()))
            begin = None
    if begin is not None and text[begin:].strip():
        found.append((begin, text[begin:].strip()))
    return [(at, passage) for at, passage in found if len(words_of(passage)) >= 4]


def _ends(text: str, whole_rows: bool) -> list[int]:
    ends = [match.end() for match in PASSAGE_END.finditer(text)]
    if not whole_rows:
        return ends
    rows = [(match.start(), match.end()) for match in re.finditer(r"^[ \t]*\|.*$", text, re.MULTILINE)]
    kept, at = [], 0
    for end in ends:
        while at < len(rows) and rows[at][1] < end:
            at += 1
        if at == len(rows) or not rows[at][0] < end <= rows[at][1]:
            kept.append(end)
    return kept


def cut(text: str) -> list[Passage]:
    """The passages of a text that are looked up, in its order."""
    length = UNSPACED_LENGTH if is_unspaced(text) else LENGTH
    marked, at, section = headings(text), 0, ""
    tables = table_heads(text)
    begins = [first for first, _, _ in tables]
    found: list[Passage] = []
    for offset, piece in passages(text, length, whole_rows=True):
        while at < len(marked) and marked[at][0] <= offset:
            section, at = marked[at][1], at + 1
        start = _SPACE.match(text, offset).end()  # type: ignore[union-attr]
        for begin, part in _shortened(piece, _LONGEST * length):
            place = start + begin
            table = tables[bisect_left(begins, place) - 1] if tables and begins[0] < place else None
            head = table[2] if table is not None and place < table[1] else ""
            above = [line for line in (section, head) if line]
            found.append(Passage("\n".join([*above, part]), place, place + len(part)))
    return found


def table_heads(text: str) -> list[tuple[int, int, str]]:
    """(where its rows begin, where they end, the row of its columns' names) of every table in Markdown."""
    found: list[tuple[int, int, str]] = []
    offset, lines = 0, text.split("\n")
    for number, line in enumerate(lines):
        offset += len(line) + 1
        if found and offset <= found[-1][1]:
            continue  # a row of the table before, however it looks
        if number and "|" in line and _is_rule(line) and "|" in lines[number - 1]:
            end, row = offset, number + 1
            while row < len(lines) and "|" in lines[row]:
                end, row = end + len(lines[row]) + 1, row + 1
            found.append((offset - 1, end, lines[number - 1].strip()))
    return found


def _is_rule(line: str) -> bool:
    """Whether it parts a table's head from its rows."""
    return "-" in line and not line.strip("|:- \t\r")


def _shortened(piece: str, longest: int) -> Iterator[tuple[int, str]]:
    """(offset, part) of a piece without ends of lines or sentences, none longer than `longest`."""
    begin = 0
    while len(piece) - begin > longest:
        space = piece.rfind(" ", begin + longest // 2, begin + longest)
        end = begin + longest if space < 0 else space
        yield begin, piece[begin:end].rstrip()
        begin = _SPACE.match(piece, end).end()  # type: ignore[union-attr]
    if begin < len(piece):
        yield begin, piece[begin:]


def joined(found: Sequence[Passage]) -> str:
    """Passages, given best first, as they stand in a prompt: the best last, nearest to the question, as small models
    heed most what they read last."""
    return "\n\n".join(passage.text for passage in reversed(found))


def before_question(found: Sequence[Passage], question: str) -> str:
    """A user's turn that begins with passages. Serving and measuring write it in the same way."""
    return f"{joined(found)}\n\n{question}" if found else question
