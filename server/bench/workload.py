"""What is asked: prompts of token ids, made from a seed and an index alone, so that every server gets the same."""

from __future__ import annotations

import functools
import random
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import msgspec


@dataclass(frozen=True)
class Workload:
    """`input_tokens` are new in every request; with `contexts`, one of so many shared contexts stands before them."""

    name: str
    input_tokens: int
    output_tokens: int
    contexts: int = 0
    context_tokens: int = 0


WORKLOADS: Mapping[str, Workload] = MappingProxyType(
    {
        workload.name: workload
        for workload in (
            Workload("plain", 256, 64),
            Workload("short", 32, 32),
            Workload("hot", 32, 32, contexts=2, context_tokens=1500),
            Workload("many", 32, 32, contexts=400, context_tokens=1500),
        )
    }
)


@dataclass(frozen=True)
class Requests:
    """Bodies for /v1/completions, one per index. Two indices or seeds share no prefix, except a context.

    Contexts do not depend on `seed`: they are what a server may keep from run to run. `soft_prompt`, such as
    `context-{index}`, names the soft prompt that is sent in a context's place.
    """

    workload: Workload
    model: str
    seed: int
    vocab_size: int = 32_000
    soft_prompt: str | None = None

    def body(self, index: int, max_tokens: int | None = None) -> bytes:
        """`max_tokens` other than the workload's is for requests that only warm up."""
        work = self.workload
        draw = random.Random(f"{self.seed}/{work.name}/{index}")
        prompt = self._tokens(draw, work.input_tokens)
        fields: dict[str, object] = {
            "model": self.model,
            "max_tokens": work.output_tokens if max_tokens is None else max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if work.contexts:
            chosen = draw.randrange(work.contexts)
            if self.soft_prompt is None:
                prompt = [*context_tokens(chosen, work.context_tokens, self.vocab_size), *prompt]
            else:
                fields["soft_prompt"] = self.soft_prompt.format(index=chosen)
        return msgspec.json.encode({**fields, "prompt": prompt})

    def _tokens(self, draw: random.Random, count: int) -> list[int]:
        return draw.choices(_vocabulary(self.vocab_size), k=count)


@functools.lru_cache(maxsize=512)
def context_tokens(index: int, count: int, vocab_size: int) -> tuple[int, ...]:
    """The context number `index`: whoever makes soft prompts for a run makes them of these."""
    return tuple(random.Random(f"context/{index}").choices(_vocabulary(vocab_size), k=count))


def _vocabulary(size: int) -> range:
    """Without the first tokens, among which the special ones are."""
    return range(min(256, size // 2), size)
