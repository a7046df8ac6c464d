"""Whether an answer is right: it contains one of the texts that a question accepts, however they are written."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import regex

from softbatch.prompt_store.compression.data.language import is_unspaced

_THOUSANDS = regex.compile(r"(?<=\d)[,'\u2019\u00a0\u202f ](?=\d{3}(?!\d))")
_PIECES = regex.compile(r"\p{N}+|(?:[^\W\d_]\p{M}*)+")
# The last word of an accepted text may have an ending if it has so many letters.
_MAY_END = 4
_Z = 1.959964  # of a 95 % interval


def pieces_of(text: str) -> list[str]:
    """Numbers and words without case, marks and spelling variants: 2,500 is 2500, 5V is 5 V, no_show is no show."""
    text = unicodedata.normalize("NFKC", text).casefold().replace("%", " percent ").replace("per cent", "percent")
    found: list[str] = _PIECES.findall(_THOUSANDS.sub("", text))
    return found


def contains(answer: str, accepted: str) -> bool:
    """Whether the pieces of `accepted` stand in the answer in this order, whole; the last word may go on."""
    wanted, pieces = pieces_of(accepted), pieces_of(answer)
    if not wanted:  # nothing but marks, as a plus sign
        return accepted.strip() in answer
    if is_unspaced(accepted):
        return "".join(wanted) in "".join(pieces)
    *first, last = wanted
    for at in range(len(pieces) - len(wanted) + 1):
        end = pieces[at + len(first)]
        goes_on = len(last) >= _MAY_END and last.isalpha() and end.startswith(last)
        if pieces[at : at + len(first)] == first and (end == last or goes_on):
            return True
    return False


def is_right(answer: str, accept: Sequence[str]) -> bool:
    return any(contains(answer, text) for text in accept)


@dataclass(frozen=True)
class Share:
    """So many of so many, and the bounds that hold the true share with 95 % confidence (Wilson's interval)."""

    right: int
    questions: int

    @property
    def bounds(self) -> tuple[float, float]:
        n, z2 = self.questions, _Z * _Z
        if n == 0:
            return 0.0, 1.0
        share = self.right / n
        middle = (share + z2 / (2 * n)) / (1 + z2 / n)
        reach = _Z / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
        return max(0.0, middle - reach), min(1.0, middle + reach)
