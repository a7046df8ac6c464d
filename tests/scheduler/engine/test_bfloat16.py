"""In bfloat16 every greedy token is one that transformers, in bfloat16 too, finds as good as the best."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from softbatch.scheduler.engine.engine import build_engine
from softbatch.scheduler.protocol import AddRequest, EngineConfig, SamplingParams
from tests.support.models import Reference, sample_texts

TOKENS = 24


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


def generate(path: str, prompts: list[list[int]], device: str) -> list[list[int]]:
    config = EngineConfig(
        model=path,
        device=device,
        dtype="bfloat16",
        kv_cache_gib=0.2,
        max_batch_size=6,
        max_batch_tokens=37,
        max_model_len=256,
    )
    engine, _ = build_engine(config, lambda *_: None)
    params = SamplingParams(max_tokens=TOKENS, temperature=0.0, ignore_eos=True)
    for index, ids in enumerate(prompts):
        engine.handle(AddRequest(request_id=str(index), token_ids=ids, params=params))
    found: list[list[int]] = [[] for _ in prompts]
    while engine.has_work:
        for output in engine.step().outputs:
            assert output.error is None
            found[int(output.request_id)] += output.token_ids
    engine.close()
    return found


@torch.inference_mode()
def check(path: str, prompts: list[list[int]], device: str) -> None:
    """A step in bfloat16 is 1/128 of a number's size; sums of such numbers may disagree by a few."""
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval().to(device)
    same = total = 0
    for prompt, tokens in zip(prompts, generate(path, prompts, device), strict=True):
        assert len(tokens) == TOKENS
        logits = model(torch.tensor([[*prompt, *tokens]], device=device)).logits[0, len(prompt) - 1 : -1].float().cpu()
        best, chosen = logits.max(-1).values, logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        assert ((best - chosen) <= 4 / 128 * best.abs().clamp_min(1) + 0.05 * logits.std(-1)).all()
        same += int((logits.argmax(-1) == torch.tensor(tokens)).sum())
        total += TOKENS
    assert same >= 0.8 * total


def test_tiny_models(tiny: Reference, device: str) -> None:
    check(tiny.path, [[(i * 31 + j * 7) % 40_000 for j in range(1 + 9 * i)] for i in range(6)], device)


@pytest.mark.gpu
def test_the_embedded_model(smollm2: Reference) -> None:
    check(smollm2.path, [smollm2.tokenizer(text)["input_ids"] for text in sample_texts(12)], "cuda")
