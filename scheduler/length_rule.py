"""Models that turn the positions of long sequences otherwise than those of short ones, and what follows for each."""

from __future__ import annotations

from dataclasses import dataclass

from softbatch.scheduler.protocol import SoftPromptRef


@dataclass(frozen=True)
class LengthRule:
    """Sequences of more than `original` tokens are long. A token's position turns as in a long sequence if its own is
    one when the token is computed: all of a long prompt, and every token of any sequence behind `original` others.

    What a sequence has computed before it became long stays as it is, unless the model `renews` it: then it is computed
    again, as one of its length. Behind a soft prompt, whose keys are given, nothing is.
    """

    original: int
    renews: bool = False

    def soft_prompt_of(self, ref: SoftPromptRef, prompt_tokens: int) -> SoftPromptRef:
        """The soft prompt as it stands in front of a prompt of so many tokens."""
        return ref.turned(self.long) if ref.num_virtual_tokens + prompt_tokens > self.original else ref

    @property
    def long(self) -> int:
        """The shortest long sequence, which turns as all of them."""
        return self.original + 1
