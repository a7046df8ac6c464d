"""The example contexts, and the soft prompt that is shipped with one of them."""

from __future__ import annotations

import copy
import hashlib
from pathlib import Path

import pytest

from softbatch.prompt_store.compression.data.examples import load_jsonl
from softbatch.prompt_store.compression.evaluation.fidelity import position_scores
from softbatch.prompt_store.compression.frozen.context import Context
from softbatch.prompt_store.compression.frozen.frozen_model import Decoder
from softbatch.prompt_store.compression.frozen.greedy import greedy
from softbatch.prompt_store.compression.frozen.prefix import Prefix
from softbatch.prompt_store.compression.frozen.rendering import TrainingPair
from softbatch.prompt_store.compression.frozen.tokenized_context import TokenizedContext
from softbatch.prompt_store.compression.training.hidden_states import hidden_states_of
from softbatch.prompt_store.soft_prompt_file import check_fits, load
from softbatch.scheduler.model.loader import spec_of
from tests.support.models import Reference

EXAMPLES = Path(__file__).parents[3] / "examples"
SHIPPED = EXAMPLES / "manual" / "manual.safetensors"


@pytest.mark.parametrize("name", ["manual", "policy", "api"])
def test_contexts_and_questions(name: str, smollm2: Reference) -> None:
    tokens = smollm2.tokenizer((EXAMPLES / name / "context.md").read_text(encoding="utf-8"))["input_ids"]
    assert 1000 <= len(tokens) <= 3000
    assert len({question.input for question in load_jsonl(EXAMPLES / name / "questions.jsonl")}) == 40


def test_the_shipped_soft_prompt_stands_for_its_context(smollm2: Reference) -> None:
    """Nearer to the full context than the truncated one, on hand-written questions, in the embedded model."""
    prompt = load(SHIPPED, 8 << 20)
    check_fits(prompt, spec_of("smollm2-135m", smollm2.model, smollm2.tokenizer))
    text = (EXAMPLES / "manual" / "context.md").read_text(encoding="utf-8")
    assert prompt.manifest.context is not None
    assert prompt.manifest.context.sha256 == hashlib.sha256(text.encode()).hexdigest()
    decoder = Decoder(copy.deepcopy(smollm2.model))
    context = Context(decoder, TokenizedContext(smollm2.tokenizer, text, None, 16, decoder.window))
    asked = load_jsonl(EXAMPLES / "manual" / "questions.jsonl")[::5]
    questions = [tuple(context.renderer.question(one.input)) for one in asked]
    answers = greedy(decoder, context.full[0], questions, 16, context.renderer.stop_ids)
    pairs = [TrainingPair(z, tuple(y)) for z, y in zip(questions, answers, strict=True)]
    teacher = hidden_states_of(decoder, context.full, pairs).states

    def kl(prefix: Prefix | None) -> float:
        return position_scores(decoder, hidden_states_of(decoder, [prefix], pairs).states, teacher, pairs).kl

    tensors = prompt.tensors
    sigma = kl(Prefix(tensors["keys"], tensors["values"]))
    assert sigma < 0.25 * kl(None)
    assert sigma < 0.5 * kl(context.truncated(prompt.manifest.num_virtual_tokens))
