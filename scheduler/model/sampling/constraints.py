"""Which tokens each sequence of a step may have next: by its grammar, its lists of tokens, and its least length."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from softbatch.scheduler.model.sampling.adjustments import allowed_mask, ends_of_bad_words, mask_without
from softbatch.scheduler.model.sampling.grammar import GrammarError, GrammarMasks
from softbatch.scheduler.sequence import Sequence


@dataclass(frozen=True)
class Constraint:
    """Either a `mask` that says it all, or tokens that are `barred`; as in a `SampleInput`."""

    barred: tuple[int, ...] = ()
    mask: np.ndarray | None = None


class Constraints:
    """Owns the masks of the sequences that have one; they depend on a sequence's tokens alone."""

    def __init__(self, grammars: GrammarMasks | None) -> None:
        self._grammars = grammars
        self._allowed: weakref.WeakKeyDictionary[Sequence, np.ndarray] = weakref.WeakKeyDictionary()

    def prepare(self, grammar: str) -> None:
        """Compile a grammar that will be asked for; safe to call from another thread."""
        if self._grammars is not None:
            with contextlib.suppress(GrammarError):  # it fails again, and alone, when its sequence samples
                self._grammars.compile(grammar)

    def of(
        self, sequences: Iterable[Sequence], vocab_size: int, own_choices: Mapping[str, int]
    ) -> dict[str, Constraint | GrammarError]:
        """By request id, of those that may not have any token. `own_choices` are the tokens that some will have if they
        may: for one whose own choice its grammar allows, nothing more is asked."""
        found: dict[str, Constraint | GrammarError] = {}
        with_grammar = []
        for sequence in sequences:
            params = sequence.params
            if params.grammar:
                if not self._may_have(sequence, own_choices.get(sequence.request_id)):
                    with_grammar.append(sequence)
            elif params.allowed_token_ids:
                mask = mask_without(self._allowed_mask(sequence, vocab_size), _barred(sequence))
                found[sequence.request_id] = Constraint(mask=mask)
            elif barred := _barred(sequence):
                found[sequence.request_id] = Constraint(barred)
        if with_grammar:
            found |= self._by_grammar(with_grammar)
        return found

    def _may_have(self, sequence: Sequence, token: int | None) -> bool:
        """Whether it surely may. To ask a grammar for one token takes a tenth of what its mask does."""
        if token is None or self._grammars is None or token in _barred(sequence):
            return False
        return self._grammars.allow(sequence, token)

    def _by_grammar(self, sequences: list[Sequence]) -> dict[str, Constraint | GrammarError]:
        if self._grammars is None:
            return {s.request_id: GrammarError("this model's tokenizer cannot follow one") for s in sequences}
        masks = self._grammars.next_masks(sequences)
        found: dict[str, Constraint | GrammarError] = {}
        for sequence in sequences:
            mask = masks[sequence.request_id]
            found[sequence.request_id] = (
                mask if isinstance(mask, GrammarError) else Constraint(mask=mask_without(mask, _barred(sequence)))
            )
        return found

    def _allowed_mask(self, sequence: Sequence, vocab_size: int) -> np.ndarray:
        if sequence not in self._allowed:
            self._allowed[sequence] = allowed_mask(sequence.params.allowed_token_ids, vocab_size)
        return self._allowed[sequence]


def _barred(sequence: Sequence) -> tuple[int, ...]:
    params = sequence.params
    barred = () if sequence.may_end else params.ending_ids
    if params.bad_words:
        barred = (*barred, *ends_of_bad_words(params, sequence.tokens[sequence.num_prompt :]))
    return barred
