"""A context and settings with which a compression ends within seconds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from softbatch.prompt_store.compression.evaluation.free_answers import Respond, Response, Sigma
from softbatch.prompt_store.compression.frozen.frozen_model import Decoder
from softbatch.prompt_store.compression.frozen.greedy import greedy
from softbatch.prompt_store.compression.training.student import Student

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


def responder(decoder: Decoder) -> Respond:
    """The same behind σ, where there is one."""

    def respond(prompts: list[list[int]], max_tokens: int, sigma: Sigma | None) -> list[Response]:
        prefix = None if sigma is None else Student(decoder, sigma.kind, sigma.tensors).fixed_prefix()
        return [Response(ids, 0.001) for ids in greedy(decoder, prefix, prompts, max_tokens, {2})]

    return respond


def engine(decoder: Decoder) -> Callable[[list[list[int]], int], list[list[int]]]:
    """Greedy answers with nothing shared: what the batched engine gives, only slower."""
    return lambda prompts, max_tokens: greedy(decoder, None, prompts, max_tokens, {2})
