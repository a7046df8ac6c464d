"""A context as the model reads it: its turn in tokens, in segments where the turn is longer than the model's window."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from itertools import cycle, pairwise
from typing import Any

from softbatch.prompt_store.compression.data.examples import Example
from softbatch.prompt_store.compression.data.language import words_of
from softbatch.prompt_store.compression.frozen.rendering import Renderer, Segment

# What a user turn may take beside the answer.
QUESTION_ROOM = 384
UNBOUNDED = 1 << 30


def sha256_of(context: str) -> str:
    """A context's identity, in manifests and in the work directory."""
    return hashlib.sha256(context.encode()).hexdigest()


class TokenizedContext:
    """Tokenised at the first use of `segments`, and once. `window` None: the model sets no bound."""

    def __init__(
        self,
        tokenizer: Any,
        text: str,
        instruction: str | None,
        max_answer_tokens: int,
        window: int | None,
        vocab_size: int | None = None,
    ) -> None:
        self.text, self.max_answer_tokens = text, max_answer_tokens
        self.window = window or UNBOUNDED
        self.renderer = Renderer(tokenizer, instruction, vocab_size)

    @cached_property
    def segments(self) -> list[Segment]:
        """Raises TemplateError, or ValueError when the window is too small for any part of the context."""
        self.renderer.check(self.text, "context")
        return self.renderer.segments(self.text, self.window - QUESTION_ROOM - self.max_answer_tokens)

    @property
    def num_tokens(self) -> int:
        return sum(len(part.ids) for part in self.segments)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence that is made of it: context, question and answer."""
        return self.num_tokens + QUESTION_ROOM + self.max_answer_tokens

    @property
    def sha256(self) -> str:
        return sha256_of(self.text)

    def check_questions(self, examples: Sequence[Example]) -> None:
        """Raises ValueError for a question that has no room in the model's window behind the context, by its number."""
        room = self.window - max(len(part.ids) for part in self.segments) - self.max_answer_tokens
        # No token is shorter than a byte, so that short questions need not be tokenised.
        marks = len(self.renderer.question("x")) if examples else 0
        for number, example in enumerate(examples, start=1):
            if len(example.input.encode()) + marks <= room:
                continue
            tokens = len(self.renderer.question(example.input))
            if tokens > room:
                raise ValueError(f"questions: number {number} has {tokens} tokens; there is room for {room}")

    def placed(self, examples: Sequence[Example]) -> list[Example]:
        """Questions that do not say what part of the context they are about, each at a segment: the user's where their
        words, and those of their answer, point to (every word votes with the share of its occurrences there), those
        about the whole in turn."""
        if len(self.segments) == 1:
            return list(examples)
        ends = [0.0, *(part.end for part in self.segments)]
        cuts = [round(end * len(self.text)) for end in ends]
        counts = [Counter(words_of(self.text[start:end])) for start, end in pairwise(cuts)]
        total = sum(counts, Counter())
        turns = cycle(range(len(counts)))

        def segment(example: Example) -> int:
            if example.kind == "general":
                return next(turns)
            words = {word for word in words_of(f"{example.input} {example.output or ''}") if word in total}
            votes = [sum(part[word] / total[word] for word in words) for part in counts]
            return max(range(len(votes)), key=votes.__getitem__)

        def placed(example: Example) -> Example:
            if example.position > 0 or (example.source != "user" and example.kind != "general"):
                return example
            at = segment(example)
            return replace(example, position=(ends[at] + ends[at + 1]) / 2)

        return [placed(example) for example in examples]
