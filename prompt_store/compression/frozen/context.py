"""One context in front of one model: its tokens, its KV, and everything of σ's length that is made from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor

from softbatch.prompt_store.compression.data.examples import Example, Generate
from softbatch.prompt_store.compression.frozen.frozen_model import Decoder
from softbatch.prompt_store.compression.frozen.prefix import Prefix
from softbatch.prompt_store.compression.frozen.rendering import TrainingPair, group_of
from softbatch.prompt_store.compression.frozen.tokenized_context import TokenizedContext
from softbatch.prompt_store.compression.frozen.untrained_start import chosen_positions, moved_prefix, truncated_ids

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


class Context:
    """A longer context than the model's window is held as segments; each question is then answered from one of them."""

    def __init__(self, decoder: Decoder, tokenized: TokenizedContext) -> None:
        self.decoder, self.tokenized = decoder, tokenized
        self.renderer, self.segments = tokenized.renderer, tokenized.segments
        self.head, self.tail = self.renderer.frame()

    @property
    def num_tokens(self) -> int:
        return self.tokenized.num_tokens

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

    def pair(self, example: Example) -> TrainingPair:
        return self.renderer.pair(example, self.segments, self.tokenized.max_answer_tokens)

    def ask(self, examples: Sequence[Example], max_tokens: int, generate: Generate) -> list[list[int]]:
        """Greedy answers, segment by segment, so that each segment's KV is shared by its questions."""
        answers: list[list[int]] = [[] for _ in examples]
        for group, part in enumerate(self.segments):
            mine = [i for i, e in enumerate(examples) if group_of(e, self.segments) == group]
            if mine:
                prompts = [[*part.ids, *self.renderer.question(examples[i].asked)] for i in mine]
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
