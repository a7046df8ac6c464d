"""Contexts and examples as tokens, through the template that serving uses: no skew between the two. No torch."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from softbatch.prompt_store.compression.data.examples import Example
from softbatch.prompt_store.control_tokens import ControlTokens
from softbatch.prompt_store.template import TemplateError, context_turn, render_chat, turn_end


@dataclass(frozen=True)
class Segment:
    """A part of the context that fits the model's window: its turn as tokens, and where in the context it
    ends."""

    ids: tuple[int, ...]
    end: float


@dataclass(frozen=True)
class TrainingPair:
    """The user turn as tokens, up to where the answer begins, and the gold answer with its stop token.

    `group` names what the pair's teacher saw: pairs of one group share one teacher prefix. `asked` is the user turn as
    the teacher reads it, where that is another one.
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    group: int = 0
    asked: tuple[int, ...] = ()

    @property
    def of_teacher(self) -> TrainingPair:
        return replace(self, prompt=self.asked, asked=()) if self.asked else self

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.answer) - 1


class Renderer:
    """Tokenises for one (tokenizer, instruction). Raises softbatch.prompt_store.template.TemplateError.

    `vocab_size` is the model's: a tokenizer may have tokens for which it has no embedding.
    """

    def __init__(self, tokenizer: Any, instruction: str | None = None, vocab_size: int | None = None) -> None:
        self.tokenizer = tokenizer
        self._control = ControlTokens(tokenizer)
        self._instruction = None if instruction is None else self._control.quote(instruction)
        self._vocab_size = vocab_size
        self._has_too_many = vocab_size is not None and max(tokenizer.get_vocab().values()) >= vocab_size

    def tokens(self, text: str) -> list[int]:
        """Of text alone: no control token is made of it."""
        return self._control.encode(self._control.quote(text))

    def text(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def check(self, text: str, param: str) -> None:
        """Raises TemplateError for a text with a token that the model does not have."""
        if self._vocab_size is None or not self._has_too_many:
            return
        wrong = next((token for token in self.tokens(text) if token >= self._vocab_size), None)
        if wrong is not None:
            name = self.tokenizer.convert_ids_to_tokens(wrong)
            raise TemplateError(
                f"{param}: the model has no token {wrong} ('{name}'): its token ids are 0 to {self._vocab_size - 1}",
                param=param,
                code="token_id",
            )

    @cached_property
    def turn_end(self) -> int | None:
        return turn_end(self.tokenizer)

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """The end-of-sequence token and whatever the template ends an assistant turn with."""
        return frozenset({self.tokenizer.eos_token_id, self.turn_end} - {None})

    def context(self, text: str) -> list[int]:
        """The tokens σ stands for."""
        return self._control.encode(context_turn(self.tokenizer, self._control.quote(text), self._instruction))

    def frame(self) -> tuple[int, int]:
        """How many tokens of the context's turn come before and after the context itself."""
        mark = "\u2042"
        head, _, tail = context_turn(self.tokenizer, mark, self._instruction).partition(mark)
        return len(self._control.encode(head)), len(self._control.encode(tail))

    def question(self, message: str) -> list[int]:
        """The user turn as it follows the context or σ, up to where the answer begins."""
        turns = self._control.quote_turns([_user(message)])
        return self._control.encode(render_chat(self.tokenizer, turns, replaces="system"))

    def without_context(self) -> list[int]:
        """What stands before the user turn when there is no context: the instruction or the model's
        default."""
        if self._instruction:
            return self._control.encode(context_turn(self.tokenizer, self._instruction))
        message = [_user("x")]
        suffix = render_chat(self.tokenizer, message, replaces="system")
        return self._control.encode(render_chat(self.tokenizer, message).removesuffix(suffix))

    def segments(self, context: str, window: int) -> list[Segment]:
        """The whole context where its turn fits `window` tokens, else about equal parts cut between
        paragraphs, lines or words. Raises ValueError when the window is too small for any."""
        whole = self.context(context)
        if len(whole) <= window:
            return [Segment(tuple(whole), 1.0)]
        room = window - sum(self.frame())
        if room < 16:
            raise ValueError(f"the model's window leaves {max(0, room)} tokens for the context; 16 are needed")
        parts = -(-len(whole) // (room * 9 // 10))
        while True:
            texts = _cut(context, parts)
            rendered = [self.context(text) for text in texts]
            if all(len(ids) <= window for ids in rendered):
                break
            parts += 1
        found, end = [], 0
        for text, ids in zip(texts, rendered, strict=True):
            end += len(text)
            found.append(Segment(tuple(ids), end / len(context)))
        return found

    def pair(self, example: Example, segments: Sequence[Segment], max_answer_tokens: int) -> TrainingPair:
        """The tokens of an answered example; its teacher is the segment that holds its position."""
        if example.output is None:
            raise ValueError("the example has no gold answer")
        answer = self.tokens(example.output)[:max_answer_tokens]
        stop = self.tokenizer.eos_token_id if self.turn_end is None else self.turn_end
        if not example.cut and len(answer) < max_answer_tokens and stop is not None:
            answer.append(stop)
        asked = tuple(self.question(example.asked)) if example.passage else ()
        return TrainingPair(tuple(self.question(example.input)), tuple(answer), group_of(example, segments), asked)

    def answer(self, ids: Sequence[int], max_tokens: int, stop_ids: Collection[int]) -> tuple[str, bool]:
        """(text, was it cut at `max_tokens`) of generated tokens, with or without their stop token."""
        stopped = next((index for index, token in enumerate(ids) if token in stop_ids), None)
        text = self.text(ids if stopped is None else ids[:stopped])
        return text, stopped is None and len(ids) >= max_tokens


def group_of(example: Example, segments: Sequence[Segment]) -> int:
    return next((i for i, part in enumerate(segments) if example.position < part.end), len(segments) - 1)


def _user(message: str) -> dict[str, str]:
    return {"role": "user", "content": message}


def _cut(text: str, parts: int) -> list[str]:
    """`text` in `parts` pieces of about the same length, cut behind a paragraph, a line or a word if one is
    near."""
    cuts = [0]
    for part in range(1, parts):
        ideal = part * len(text) // parts
        reach = len(text) // parts // 4
        low, high = max(cuts[-1] + 1, ideal - reach), ideal + 1
        for mark in (r"\n\s*\n", r"\n", r"\s"):
            ends = [match.end() for match in re.finditer(mark, text[low:high])]
            if ends:
                ideal = low + ends[-1]
                break
        cuts.append(max(cuts[-1] + 1, ideal))
    return [text[start:end] for start, end in zip(cuts, [*cuts[1:], len(text)], strict=True)]
