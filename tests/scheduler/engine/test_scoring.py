"""Scores are the log-probabilities that plain transformers gives, chunked, preempted, and behind soft prompts."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from softbatch.prompt_store.soft_prompt_file import SoftPrompt
from softbatch.scheduler.protocol import AddRequest, SamplingParams, SoftPromptRef
from tests.support.engines import build, check_empty
from tests.support.models import Reference, make_soft_prompt, save_prompt


@torch.inference_mode()
def expected_scores(reference: Reference, token_ids: list[int], start: int, prompt: SoftPrompt | None) -> list[float]:
    embed = reference.model.get_input_embeddings()
    inputs = embed(torch.tensor([token_ids]))
    virtual = 0
    if prompt is not None:
        virtual = prompt.manifest.num_virtual_tokens
        inputs = torch.cat([prompt.embeddings[None], inputs], dim=1)
    logits = reference.model(inputs_embeds=inputs).logits[0, virtual:]
    table = torch.log_softmax(logits, -1)
    return [float(table[i - 1, token_ids[i]]) for i in range(start, len(token_ids))]


def test_scores_equal_transformers(tiny: Reference, tmp_path: Path) -> None:
    engine, ready = build(
        tiny.path, num_blocks=16, block_size=8, max_batch_size=5, max_batch_tokens=11, max_model_len=100
    )
    prompt = make_soft_prompt("embeddings", 13, ready.model)
    ref = SoftPromptRef("5" * 64, str(save_prompt(prompt, tmp_path, "p")), 13)
    rng = random.Random(8)
    shared = [rng.randrange(100, 40_000) for _ in range(20)]
    cases: dict[str, tuple[AddRequest, list[float]]] = {}
    for i in range(12):
        tokens = shared + [rng.randrange(100, 40_000) for _ in range(rng.randint(1, 20))]
        start = rng.choice([1, 20, len(tokens) - 1])
        soft = ref if i % 2 else None
        request = AddRequest(
            request_id=f"s{i}",
            token_ids=tokens,
            params=SamplingParams(max_tokens=0),
            soft_prompt=soft,
            score_from=start,
        )
        cases[request.request_id] = (request, expected_scores(tiny, tokens, start, prompt if soft else None))
        engine.handle(request)
        engine.handle(
            AddRequest(request_id=f"g{i}", token_ids=tokens, params=SamplingParams(max_tokens=25, temperature=0.0))
        )
    scores, preempted = {}, 0
    while engine.has_work:
        output = engine.step()
        preempted += len(output.preempted)
        for sequence in output.outputs:
            if sequence.scores is not None:
                scores[sequence.request_id] = sequence.scores
    assert preempted > 0
    for name, (_, expected) in cases.items():
        assert scores[name] == pytest.approx(expected, abs=2e-4), name
    check_empty(engine)
