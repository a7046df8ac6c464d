"""Which passages of a text are about a question: BM25 over words of any script."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from itertools import pairwise

import regex

from softbatch.prompt_store.compression.data.language import is_unspaced, words_of
from softbatch.prompt_store.compression.data.passages import Passage, cut
from softbatch.prompt_store.compression.data.phrases import title

_PARTS = regex.compile(r"\p{N}+|[^\W\d_]+")
# So many letters stand for a word in any of its forms.
_STEM = 5


def terms_of(text: str) -> list[str]:
    """What a text is looked up by: its words, their beginnings and parts; of a script without spaces characters and
    pairs of them."""
    words = words_of(unicodedata.normalize("NFKC", text))
    found = list(words)
    for word in words:
        parts = _PARTS.findall(word)
        if len(parts) > 1:
            found += parts
        found += [f"{part[:_STEM]}-" for part in parts if len(part) >= _STEM]
    found += [a + b for a, b in pairwise(words) if is_unspaced(a) and is_unspaced(b)]
    return found


class PassageIndex:
    """The passages of one text, to be looked up by any number of threads."""

    def __init__(self, text: str) -> None:
        import bm25s  # with numpy, which a server imports behind its start

        self.passages = cut(text)
        self._ranking = bm25s.BM25()
        terms = [terms_of(passage.text) for passage in self.passages]
        self._is_empty = not any(terms)
        # Questions name the text that they are about. As every passage is of it, its name says nothing about where.
        name = terms_of(title(text))
        terms = [[*name, *of_passage] for of_passage in terms]
        if not self._is_empty:
            self._ranking.index(terms, show_progress=False)
        self.num_bytes = 8 * sum(map(len, terms)) + 4 * len(text)

    def best(self, question: str, count: int) -> list[Passage]:
        """Up to `count` passages that share words with the question, be it the text's name, best first."""
        known = [term for term in terms_of(question) if not self._is_empty and term in self._ranking.vocab_dict]
        if not known or count <= 0:
            return []
        scores = self._ranking.get_scores(known).tolist()
        order = sorted(range(len(scores)), key=lambda index: (-scores[index], index))
        return [self.passages[index] for index in order[:count] if scores[index] > 0]


def within(found: Sequence[Passage], sizes: Sequence[int], budget: int) -> list[Passage]:
    """The first passages that fit a budget of tokens together, but at least one."""
    kept, total = list(found[:1]), sum(sizes[:1])
    for passage, size in zip(found[1:], sizes[1:], strict=True):
        if total + size > budget:
            break
        kept.append(passage)
        total += size
    return kept
