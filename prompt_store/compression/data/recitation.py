"""Questions whose gold answer is a passage of the context itself.

Answers that list or quote hold most of what a compressed context gets wrong. The teacher with the full context copies
such a passage almost surely, so the context is its own gold answer and nothing needs to be generated.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from softbatch.prompt_store.compression.data.language import beginning, is_english, is_latin, is_unspaced
from softbatch.prompt_store.compression.data.passages import LENGTH, UNSPACED_LENGTH, passages
from softbatch.prompt_store.compression.data.phrases import headings, plain, title

# {s} the section, {w} the passage's first words, {t} the document's title.
_SECTION_START = (
    "What does the section about {s} say, word for word?",
    "Name everything under {s} and say what each is for.",
    "List what {t} says about {s}.",
    "What exactly does {t} say about {s}?",
)
_INSIDE = (
    'Quote the part of {s} that begins with "{w}".',
    'What else does {t} say about {s}, from "{w}" on?',
    'Read out what follows "{w}" in {s}.',
    'Go on with the list or text: "{w}"',
)
_PLAIN = (
    'Quote the part of {t} that begins with "{w}".',
    'Continue the text: "{w}"',
    'What does {t} say from "{w}" on?',
)
# Of a script or a language that no words are known of: the beginning alone, to go on from.
_NEUTRAL = ("{w}…", "… {w} …", "“{w}…”")


def recitations(text: str, count: int, rng: random.Random, length: int = LENGTH) -> list[tuple[str, str, float]]:
    """(question, passage, position) of up to `count` passages, evenly over the text; where there are fewer passages
    than `count` each is asked for in several ways."""
    pieces = passages(text, UNSPACED_LENGTH if is_unspaced(text) else length)
    english, marked = is_english(text), headings(text)
    name = title(text) or "the document"
    asked: list[tuple[str, str, float]] = []
    rounds = -(-count // len(pieces)) if pieces else 0
    for turn in range(min(rounds, 4)):
        seen: set[str] = set()
        for index, (at, passage) in enumerate(_evenly(pieces, count - len(asked))):
            section = next((head for start, head in reversed(marked) if start <= at), "")
            forms = _PLAIN if not section or section == name else _INSIDE if section in seen else _SECTION_START
            seen.add(section)
            if not english or not is_latin(passage):
                forms = _NEUTRAL
            words = plain(beginning(passage, rng.randint(3, 5) + turn)).strip(' "|')
            form = forms[(index + turn) % len(forms)]
            asked.append((form.format(s=section, w=words, t=name), passage, at / max(1, len(text))))
    return asked


def _evenly(items: Sequence[tuple[int, str]], count: int) -> Sequence[tuple[int, str]]:
    if count >= len(items):
        return items
    return [items[index * len(items) // count] for index in range(count)]
