"""What a library's process says to `libraries.py`, in JSON lines: for any interpreter, standard library only."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

Options = dict[str, Any]
# Prompts and how many tokens follow each → what was timed.
Measure = Callable[[list[list[int]], int], dict[str, Any]]


def prompts(first: int, count: int, length: int) -> list[list[int]]:
    """The same token ids in every process; no two share a prefix, so that no cache helps."""
    return [
        [(index * 7919 + i * 104729) % 40_000 + 200 for i in range(length)] for index in range(first, first + count)
    ]


def steps(seconds: Sequence[float], tokens: Sequence[Sequence[int]], outputs: int) -> dict[str, Any]:
    """An answer: the step of all prompts and then one step per further token, with all sequences in every step."""
    if len(seconds) != outputs or any(len(row) != outputs for row in tokens):
        raise RuntimeError(f"{len(seconds)} steps for {outputs} tokens of each sequence: they did not run together")
    return {"seconds": list(seconds), "tokens": [[int(token) for token in row] for row in tokens]}


def serve(load: Callable[[Options], tuple[str, Measure]]) -> None:
    """Load with the options that the command line gives as JSON, say so, and answer until the input ends.

    Between questions the process waits for a line; `libraries.py` suspends it meanwhile, with threads that still spin.
    """
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a library prints must not stand between the answers

    def answer(content: dict[str, Any]) -> None:
        print(json.dumps(content), file=answers)

    version, measure = load(json.loads(sys.argv[1]))
    answer({"version": version})
    for line in sys.stdin:
        question = json.loads(line)
        ids = prompts(question["first"], question["count"], question["length"])
        answer(measure(ids, question["outputs"]))
