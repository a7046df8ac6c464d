"""A context and settings with which a compression ends within seconds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from softbatch.prompt_store.compression.frozen.frozen_model import Decoder
from softbatch.prompt_store.compression.frozen.greedy import greedy

CONTEXT = "# Lamp guide\n\n" + "\n\n".join(
    f"## Part {name}\n\nThe {name} lamp has {n + 2} bulbs and must be cleaned every {n * 3 + 4} days. If the {name} "
    f"lamp blinks, call the office in {name}ville. To reset the lamp, hold the {name} button for {n + 5} seconds."
    for n, name in enumerate(("red", "green", "blue", "white"))
)
SMALL: dict[str, Any] = {
    "virtual_tokens": 8,
    "steps": 4,
    "questions": 24,
    "held_out": 6,
    "free_answers": 3,
    "max_answer_tokens": 6,
    "matching_steps": 5,
    "batch_size": 4,
}


def engine(decoder: Decoder) -> Callable[[list[list[int]], int], list[list[int]]]:
    """Greedy answers with nothing shared: what the batched engine gives, only slower."""
    return lambda prompts, max_tokens: greedy(decoder, None, prompts, max_tokens, {2})
