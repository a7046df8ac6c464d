"""Measures σ and its baselines on questions that σ was not trained on."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from softbatch.prompt_store.compression.data.examples import Example
from softbatch.prompt_store.compression.evaluation.fidelity import (
    FidelityScores,
    position_scores,
    position_table,
    scores_of,
)
from softbatch.prompt_store.compression.frozen.frozen_model import Decoder
from softbatch.prompt_store.compression.frozen.greedy import greedy
from softbatch.prompt_store.compression.frozen.prefix import Prefix
from softbatch.prompt_store.compression.frozen.rendering import Renderer, Segment, TrainingPair
from softbatch.prompt_store.compression.training.hidden_states import hidden_states_of

BASELINES = ("no_context", "truncated", "untrained", "wrong_prompt", "full_context")
OFF_TOPIC = (
    "What is the capital of France?",
    "Write two sentences about the sea.",
    "What is 17 plus 25?",
    "Name three animals that live in a forest.",
    "Translate 'good morning' into Spanish.",
    "Why is the sky blue?",
    "Give me a simple recipe for pancakes.",
    "Who wrote Romeo and Juliet?",
)
_OFF_TOPIC_TOKENS = 24


@dataclass(frozen=True)
class Candidate:
    """Something to be measured: per group of questions the prefix that stands before the user turn."""

    prefixes: tuple[Prefix | None, ...]

    @classmethod
    def shared(cls, prefix: Prefix | None, groups: int) -> Candidate:
        return cls((prefix,) * groups)


@dataclass(frozen=True)
class Measured:
    """Scores on the held-out pairs, each pair's mean KL, and what it cost."""

    scores: FidelityScores
    kl: list[float]
    seconds: float


class Evaluation:
    """Answered questions about one context, none of them trained on, and the full-context model's states on them.

    `full` is the KV of each of `segments`.
    """

    def __init__(
        self,
        decoder: Decoder,
        renderer: Renderer,
        segments: Sequence[Segment],
        full: Sequence[Prefix],
        examples: Sequence[Example],
        max_answer_tokens: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not examples:
            raise ValueError("there are no questions to evaluate on")
        self.decoder, self.renderer = decoder, renderer
        self.examples = list(examples)
        self.pairs = [renderer.pair(example, segments, max_answer_tokens) for example in examples]
        self.full = Candidate(tuple(full))
        self.max_answer_tokens, self.clock = max_answer_tokens, clock
        self.teacher: list[Tensor] = hidden_states_of(decoder, list(full), self.pairs).states
        self.no_context = self._prefix_of(renderer.without_context())

    def _prefix_of(self, ids: Sequence[int]) -> Prefix | None:
        return self.decoder.encode(ids) if ids else None

    def measure(self, candidate: Candidate) -> Measured:
        began = self.clock()
        states = hidden_states_of(self.decoder, candidate.prefixes, self.pairs).states
        table = position_table(self.decoder, states, self.teacher, self.pairs)
        kl = [float(part.mean()) for part in torch.split(table[0], [len(pair.answer) for pair in self.pairs])]
        return Measured(scores_of(table), kl, self.clock() - began)

    def loss(self, prefix: Prefix) -> float:
        """The held-out KL behind one prefix for all."""
        return self.measure(Candidate.shared(prefix, len(self.full.prefixes))).scores.kl

    def baselines(
        self,
        truncated: Prefix,
        untrained: Prefix,
        wrong: Prefix,
        on_done: Callable[[str], None] | None = None,
    ) -> dict[str, Measured]:
        """The model without context, with all of it, and every baseline at σ's length."""
        groups = len(self.full.prefixes)
        candidates = {
            "no_context": Candidate.shared(self.no_context, groups),
            "full_context": self.full,
            "truncated": Candidate.shared(truncated, groups),
            "untrained": Candidate.shared(untrained, groups),
            "wrong_prompt": Candidate.shared(wrong, groups),
        }
        found: dict[str, Measured] = {}
        for name, candidate in candidates.items():
            found[name] = self.measure(candidate)
            if on_done is not None:
                on_done(name)
        # Looked at here, before training: what follows training is then as short as one baseline.
        _ = self._off_topic
        return {name: found[name] for name in BASELINES}

    @cached_property
    def _off_topic(self) -> tuple[list[TrainingPair], list[Tensor], FidelityScores]:
        """The off-topic pairs, the states on them without any context, and the full context's scores."""
        prompts = [self.renderer.question(question) for question in OFF_TOPIC]
        gold = greedy(self.decoder, self.no_context, prompts, _OFF_TOPIC_TOKENS, self.renderer.stop_ids)
        pairs = [TrainingPair(tuple(p), tuple(a)) for p, a in zip(prompts, gold, strict=True)]
        reference = hidden_states_of(self.decoder, [self.no_context], pairs).states
        full = hidden_states_of(self.decoder, [self.full.prefixes[0]], pairs).states
        return pairs, reference, position_scores(self.decoder, full, reference, pairs)

    def off_topic(self, sigma: Prefix) -> dict[str, float]:
        """What σ does to questions that have nothing to do with its context: KL and top-1 agreement with the model
        without any context, for σ and, to compare with, for the full context (its first segment)."""
        pairs, reference, full = self._off_topic
        states = hidden_states_of(self.decoder, [sigma], pairs).states
        mine = position_scores(self.decoder, states, reference, pairs)
        return {
            "kl": round(mine.kl, 6),
            "top1_agreement": round(mine.top1_agreement, 6),
            "kl_full_context": round(full.kl, 6),
            "top1_agreement_full_context": round(full.top1_agreement, 6),
        }


def save_measured(measured: dict[str, Measured], path: Path) -> None:
    """For a run that goes on later; read back by `load_measured`."""
    path.write_text(json.dumps({name: asdict(found) for name, found in measured.items()}), encoding="utf-8")


def load_measured(path: Path) -> dict[str, Measured] | None:
    """None when there is nothing of use at `path`: it is then measured again."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return {
            name: Measured(FidelityScores(**found["scores"]), list(found["kl"]), float(found["seconds"]))
            for name, found in record.items()
        }
    except (OSError, ValueError, KeyError, TypeError):
        return None
