"""A prompt and its log-probabilities, token by token, as an echo in front of the output shows them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from softbatch.scheduler.protocol import PromptLogprobs, TokenLogprobs
from softbatch.server.requests.generation import Token, token_of
from softbatch.server.requests.output_text import OutputText
from softbatch.server.requests.text import TextProcessor


@dataclass(frozen=True)
class ScoredPrompt:
    """Together the parts of the `tokens` are the `text`. Where they are not, because the tokenizer has changed the text
    that was sent, `places` say where in it each token begins, in characters."""

    text: str
    tokens: tuple[Token, ...]
    places: tuple[int, ...] | None = None


def scored_prompt(
    text: TextProcessor,
    prompt: str | Sequence[int],
    token_ids: Sequence[int],
    scores: Sequence[PromptLogprobs],
    top: int,
) -> ScoredPrompt:
    """`prompt` is what was sent, `token_ids` what became of it, and `scores` those of all its tokens but the first. Of
    the alternatives `top` are shown."""
    parts = _parts(text, token_ids)
    known = [None, *(TokenLogprobs(s.logprob, s.top_ids[:top], s.top_logprobs[:top]) for s in scores)]
    tokens = tuple(token_of(text, *each) for each in zip(token_ids, parts, known, strict=True))
    shown = b"".join(parts).decode()
    if isinstance(prompt, str) and prompt != shown:
        return ScoredPrompt(prompt, tokens, _places(text, prompt, token_ids))
    return ScoredPrompt(shown, tokens)


def _parts(text: TextProcessor, token_ids: Sequence[int]) -> list[bytes]:
    output = OutputText(text.tokens, (), (), include_stop=False)
    for token_id in token_ids:
        output.push(token_id)
    output.finish()
    return output.take_parts()


def _places(text: TextProcessor, prompt: str, token_ids: Sequence[int]) -> tuple[int, ...]:
    """As the tokenizer says it. A special token that it has put in stands where the token before it does."""
    for add_special_tokens in (True, False):
        encoding = text.backend.encode(prompt, add_special_tokens=add_special_tokens)
        if encoding.ids == list(token_ids):
            break
    places, newest = [], 0
    for start, _ in encoding.offsets:
        newest = max(newest, start)
        places.append(newest)
    return tuple(places)
