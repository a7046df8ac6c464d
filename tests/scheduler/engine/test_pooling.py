"""Embeddings are the hidden states of plain transformers: chunked, preempted, behind soft prompts, and alone."""

from __future__ import annotations

import random
from pathlib import Path

import msgspec
import pytest
import torch

from softbatch.scheduler.protocol import Pooling, SoftPromptRef
from tests.support.engines import build, check_empty, drain, make_request, tokens_of
from tests.support.models import Reference, load_reference, make_soft_prompt, save_prompt
from tests.support.pooling import embedding_request, pooled_states


@pytest.mark.parametrize("async_scheduling", ["off", "on"])
def test_embeddings_equal_transformers(tiny: Reference, tmp_path: Path, async_scheduling: str) -> None:
    """Beside sequences that generate, with beginnings in common, and with too few blocks for all of them."""
    limits = {"max_batch_size": 5, "max_batch_tokens": 11, "max_model_len": 100}
    engine, ready = build(tiny.path, num_blocks=16, block_size=8, async_scheduling=async_scheduling, **limits)
    prompt = make_soft_prompt("embeddings", 13, ready.model)
    ref = SoftPromptRef("5" * 64, str(save_prompt(prompt, tmp_path, "p")), 13)
    rng = random.Random(8)
    shared = [rng.randrange(100, 40_000) for _ in range(20)]
    requests, wanted = [], {}
    for i in range(12):
        tokens = shared + [rng.randrange(100, 40_000) for _ in range(rng.randint(0, 20))] if i else shared[:1]
        soft, pooling = (ref if i % 2 else None), "mean" if i % 3 else "last"
        requests.append(embedding_request(f"e{i}", tokens, pooling, soft))
        wanted[f"e{i}"] = pooled_states(tiny, tokens, pooling, prompt if soft else None)
        requests.append(make_request(f"g{i}", tokens, max_tokens=25))
    found = drain(engine, requests)
    assert engine.stats.preemptions_total > 0
    for name, values in wanted.items():
        (embedding,) = [output.embedding for output in found[name] if output.embedding is not None]
        assert embedding == pytest.approx(values, abs=1e-4), name
        assert (found[name][-1].finish_reason, tokens_of(found[name])) == ("length", [])
    check_empty(engine)
    (alone,) = [o.embedding for o in drain(engine, [msgspec.structs.replace(requests[6], request_id="a")])["a"]][-1:]
    assert alone == pytest.approx(wanted["e3"], abs=1e-4)


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_states_that_are_not_finite_fail_alone(tiny_models: dict[str, str], pooling: Pooling) -> None:
    reference = load_reference(tiny_models["llama"])
    engine, _ = build(reference.path, num_blocks=16, block_size=8)
    forward = engine._runner._forward
    states_of = forward.hidden_states

    def broken(batch: object) -> torch.Tensor:
        states = states_of(batch)
        states[0] = float("nan")
        return states

    forward.hidden_states = broken
    good, bad = list(range(500, 520)), list(range(600, 610))
    found = drain(engine, [embedding_request("bad", bad, pooling), embedding_request("good", good, pooling)])
    assert found["bad"][-1].error == "the model's hidden states are not finite"
    assert found["good"][-1].embedding == pytest.approx(pooled_states(reference, good, pooling), abs=1e-4)
    check_empty(engine)
