"""The two objectives differ as the theory says, on the real model.

The full context gives two next words with about 60 % and 30 %. `nll` on the gold answer makes the model all but
certain of it; `kl` keeps both probabilities and the ranking of the alternatives.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from softbatch.prompt_store.compression.frozen.frozen_model import Decoder, Kernels
from softbatch.prompt_store.compression.frozen.greedy import greedy
from softbatch.prompt_store.compression.frozen.prefix import Prefix
from softbatch.prompt_store.compression.frozen.rendering import Renderer, TrainingPair
from softbatch.prompt_store.compression.frozen.untrained_start import chosen_positions, moved_prefix
from softbatch.prompt_store.compression.training.hidden_states import hidden_states_of
from softbatch.prompt_store.compression.training.student import Student
from softbatch.prompt_store.compression.training.trainer import Trainer, TrainingSettings
from tests.support.models import Reference

CONTEXT = (
    "The ferry to Norhaven leaves at nine in the morning and at four in the afternoon. Bicycles travel free of charge; "
    "dogs need a ticket and must be kept on a lead. In strong wind the captain may cancel a crossing, and passengers "
    "then get their money back or a place on the next boat. The ferry has a small shop and a room for families."
)
QUESTIONS = (
    "When does the ferry leave?",
    "May I bring my dog?",
    "What happens in strong wind?",
    "What is on board?",
    "How do I travel with a bicycle?",
    "Who decides whether the ferry leaves?",
    "Write one sentence about Norhaven.",
    "What should I pack?",
)
VIRTUAL_TOKENS = 8


@dataclass(frozen=True)
class Fork:
    """A place where the full context leaves two ways open: (c, z), and the probabilities of what comes next."""

    context: Prefix
    prompt: tuple[int, ...]
    probabilities: Tensor

    @property
    def gold(self) -> int:
        return int(self.probabilities.argmax())


@pytest.fixture(scope="module")
def decoder(smollm2: Reference, kernels: Kernels) -> Decoder:
    return Decoder(copy.deepcopy(smollm2.model), kernels=kernels)


def next_word(decoder: Decoder, prefix: Prefix, pairs: list[TrainingPair]) -> Tensor:
    """Pr(· | prefix, z, answer so far) at every answer position, [positions, vocab]."""
    with torch.no_grad():
        return decoder.project_wide(torch.cat(hidden_states_of(decoder, [prefix], pairs).states)).softmax(-1)


@pytest.fixture(scope="module")
def fork(decoder: Decoder, smollm2: Reference) -> Fork:
    """The place in the model's own answers that comes closest to 60 % and 30 %."""
    renderer = Renderer(smollm2.tokenizer)
    context = decoder.encode(renderer.context(CONTEXT))
    prompts = [renderer.question(question) for question in QUESTIONS]
    answers = greedy(decoder, context, prompts, 24, renderer.stop_ids)
    pairs = [TrainingPair(tuple(prompt), tuple(answer)) for prompt, answer in zip(prompts, answers, strict=True)]
    places = [(*pair.prompt, *pair.answer[:at]) for pair in pairs for at in range(len(pair.answer))]
    probabilities = next_word(decoder, context, pairs)
    best = probabilities.topk(2).values
    closest = int((best - torch.tensor([0.6, 0.3])).abs().sum(1).argmin())
    found = Fork(context, places[closest], probabilities[closest])
    assert found.probabilities.topk(2).values.tolist() == pytest.approx([0.6, 0.3], abs=0.06)
    return found


def trained(decoder: Decoder, fork: Fork, objective: str, steps: int) -> Tensor:
    """Pr(· | σ, z) after training σ on this one (z, ŷ) with the objective."""
    pair = TrainingPair(fork.prompt, (fork.gold,))
    teacher = hidden_states_of(decoder, [fork.context], [pair]).states
    positions = chosen_positions(fork.context.length, VIRTUAL_TOKENS, 3, 2)
    student = Student.from_prefix(decoder, moved_prefix(decoder, [fork.context], positions))
    settings = TrainingSettings(objective=objective, steps=steps, batch_size=1, learning_rate=5e-3)
    Trainer(student, [pair], teacher, settings).run()
    return next_word(decoder, student.fixed_prefix(), [pair])[0]


def test_nll_becomes_certain_of_the_gold_answer(decoder: Decoder, fork: Fork) -> None:
    after = trained(decoder, fork, "nll", 40)
    assert after[fork.gold] > 0.95


def test_kl_keeps_both_answers_and_their_ranking(decoder: Decoder, fork: Fork) -> None:
    after = trained(decoder, fork, "kl", 60)
    top = fork.probabilities.topk(5).indices
    for token in top[:2]:
        assert after[token].item() == pytest.approx(fork.probabilities[token].item(), abs=0.05)
    assert after.topk(5).indices.tolist() == top.tolist()
