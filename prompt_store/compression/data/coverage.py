"""Which sentences of a context its questions are about."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

from softbatch.prompt_store.compression.data.examples import Example
from softbatch.prompt_store.compression.data.phrases import sentences

ROUNDING = 1e-4  # of an example's position in its file
# A sentence that is asked about so often is well covered: what was asked once was seldom learnt.
OFTEN = 3


def quarter(position: float) -> str:
    first = 25 * min(3, int(4 * position))
    return f"{first} to {first + 25} %"


def coverage(text: str, examples: Sequence[Example]) -> dict[str, Any]:
    """How many sentences the context has, and how many of them some example is about, in all and by place; a recitation
    is about all that begin in its passage. Questions about the whole count for none."""
    starts = [sentence.position for sentence in sentences(text)]
    counts = [0] * len(starts)
    for example in examples:
        if example.kind == "general" or (example.source == "user" and example.position == 0):
            continue
        end = example.position + ROUNDING
        if example.kind == "recite":
            end += len(example.output or "") / max(1, len(text))
        first = bisect_right(starts, example.position + ROUNDING) - 1
        for at in range(max(0, first), bisect_right(starts, end)):
            counts[at] += 1
    places: dict[str, list[int]] = {}
    for start, count in zip(starts, counts, strict=True):
        places.setdefault(quarter(start), []).append(count)
    return {**_counted(counts), "by_place": {place: _counted(part) for place, part in places.items()}}


def _counted(counts: Sequence[int]) -> dict[str, int]:
    return {
        "sentences": len(counts),
        "asked": sum(count > 0 for count in counts),
        "asked_often": sum(count >= OFTEN for count in counts),
    }
