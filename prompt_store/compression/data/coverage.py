"""Which sentences of a context its questions are about."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from softbatch.prompt_store.compression.data.examples import Example
from softbatch.prompt_store.compression.data.phrases import sentences

ROUNDING = 1e-4  # of an example's position in its file


def coverage(text: str, examples: Sequence[Example]) -> dict[str, int]:
    """How many sentences the context has, and how many of them some example is about; a recitation is about all that
    begin in its passage. Questions about the whole count for none."""
    starts = [sentence.position for sentence in sentences(text)]
    asked: set[int] = set()
    for example in examples:
        if example.kind == "general" or (example.source == "user" and example.position == 0):
            continue
        end = example.position + ROUNDING
        if example.kind == "recite":
            end += len(example.output or "") / max(1, len(text))
        first = bisect_right(starts, example.position + ROUNDING) - 1
        asked.update(range(max(0, first), bisect_right(starts, end)))
    return {"sentences": len(starts), "asked": len(asked)}
