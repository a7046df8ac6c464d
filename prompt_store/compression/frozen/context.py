"""One context in front of one model: its tokens, its KV, and everything of σ's length that is made from it."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import cycle, pairwise
from typing import Any

import torch
from torch import Tensor

from softbatch.prompt_store.compression.data.examples import Example, Generate, words_of
from softbatch.prompt_store.compression.frozen.frozen_model import Decoder
from softbatch.prompt_store.compression.frozen.pairs import TrainingPair
from softbatch.prompt_store.compression.frozen.prefix import Prefix
from softbatch.prompt_store.compression.frozen.rendering import Renderer, Segment, group_of
from softbatch.prompt_store.compression.frozen.untrained_start import chosen_positions, moved_prefix, truncated_ids

# What a user turn may take beside the answer.
QUESTION_ROOM = 384
# A text on another subject, for the wrong-prompt baseline when no other soft prompt is at hand.
OTHER_TEXT = (
    "Bread needs four things: flour, water, salt and yeast. Weigh 500 g of flour, add 350 g of water at 25 degrees, "
    "10 g of salt and 3 g of dry yeast. Stir until no dry flour is left and wait for half an hour. Then stretch the "
    "dough from each side and fold it over; do this three times, half an hour apart. The dough is ready when it has "
    "doubled and shakes like jelly. Shape it with wet hands, let it rest in a basket for an hour and heat the oven to "
    "240 degrees with an iron pot inside. Bake the loaf for 25 minutes with the lid on and for 15 minutes without. "
    "It should sound hollow when you knock on it. Let it cool on a rack before cutting, because the crumb is still "
    "setting. Rye takes up more water than wheat and rises less. A sourdough starter replaces the yeast: feed it "
    "with the same weight of flour and water every day, and use it when it floats. "
)


def sha256_of(context: str) -> str:
    """A context's identity, in manifests and in the work directory."""
    return hashlib.sha256(context.encode()).hexdigest()


class Context:
    """Raises ValueError for a context that is empty, no text, or cannot be cut to the model's window.

    A context longer than the window is held as segments; each question is then answered from one of them.
    """

    def __init__(
        self, decoder: Decoder, tokenizer: Any, text: str, instruction: str | None, max_answer_tokens: int
    ) -> None:
        if not text.strip():
            raise ValueError("context is empty")
        if "\0" in text:
            raise ValueError("context is not text: it contains a NUL byte")
        self.decoder, self.text, self.max_answer_tokens = decoder, text, max_answer_tokens
        self.renderer = Renderer(tokenizer, instruction)
        room = QUESTION_ROOM + max_answer_tokens
        self.segments: list[Segment] = self.renderer.segments(text, decoder.window - room)
        self.head, self.tail = self.renderer.frame()

    @property
    def sha256(self) -> str:
        return sha256_of(self.text)

    @property
    def num_tokens(self) -> int:
        return sum(len(part.ids) for part in self.segments)

    @cached_property
    def full(self) -> list[Prefix]:
        """The KV of every segment."""
        return [self.decoder.encode(part.ids) for part in self.segments]

    def prefill_seconds(self, clock: Callable[[], float]) -> float:
        """What reading the context costs a request that does without σ, measured."""
        self.decoder.wait()
        began = clock()
        for part in self.segments:
            self.decoder.encode(part.ids)
        self.decoder.wait()
        return clock() - began

    def check_length(self, virtual_tokens: int) -> None:
        """Raises ValueError when σ would be longer than what it stands for."""
        if not 2 <= virtual_tokens <= self.num_tokens:
            raise ValueError(
                f"virtual_tokens must lie between 2 and the context's {self.num_tokens} tokens, got {virtual_tokens}"
            )

    def check_questions(self, examples: Sequence[Example]) -> None:
        """Raises ValueError for a question that has no room in the model's window behind the context, by its number."""
        room = self.decoder.window - max(len(part.ids) for part in self.segments) - self.max_answer_tokens
        for number, example in enumerate(examples, start=1):
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

    def pair(self, example: Example) -> TrainingPair:
        return self.renderer.pair(example, self.segments, self.max_answer_tokens)

    def ask(self, examples: Sequence[Example], max_tokens: int, generate: Generate) -> list[list[int]]:
        """Greedy answers, segment by segment, so that each segment's KV is shared by its questions."""
        answers: list[list[int]] = [[] for _ in examples]
        for group, part in enumerate(self.segments):
            mine = [i for i, e in enumerate(examples) if group_of(e, self.segments) == group]
            if mine:
                prompts = [[*part.ids, *self.renderer.question(examples[i].input)] for i in mine]
                for index, answer in zip(mine, generate(prompts, max_tokens), strict=True):
                    answers[index] = list(answer)
        return answers

    # Of σ's length --------------------------------------------------------------------------------------------

    def untrained_kv(self, length: int) -> Prefix:
        """Evenly sampled chunks of the context's KV: kind `kv` without matching or training."""
        return moved_prefix(self.decoder, self.full, self._positions(length))

    def untrained_embeddings(self, length: int) -> Tensor:
        """Input embeddings [n, hidden] of evenly sampled chunks: where kind `embeddings` starts."""
        ids = [token for part in self.segments for token in part.ids]
        chosen = torch.tensor([ids[at] for at in self._positions(length)], device=self.decoder.device)
        return self.decoder.embed(chosen).detach()

    def truncated(self, length: int) -> Prefix:
        """The first tokens of the context and the end of its turn."""
        first = self.segments[0].ids
        return self.decoder.encode(truncated_ids(first, min(length, len(first)), self.tail))

    def other(self, length: int) -> Prefix:
        """The untrained start of a text on another subject."""
        text = OTHER_TEXT * (length // 150 + 1)
        other = self.decoder.encode(self.renderer.context(text)[: self.decoder.window])
        return moved_prefix(self.decoder, [other], chosen_positions(other.length, length, self.head, self.tail))

    def _positions(self, length: int) -> list[int]:
        return chosen_positions(self.num_tokens, length, self.head, self.tail)
