"""Every family that is served: windows, sinks and positions as transformers has them, however steps are cut."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from softbatch.scheduler.engine.engine import Engine
from softbatch.scheduler.model.batch import Row
from softbatch.scheduler.model.loader import load
from softbatch.scheduler.model.source import EMBEDDED_ALIAS, resolve
from softbatch.scheduler.protocol import EngineConfig, ModelInfo, SoftPromptRef
from tests.support.engines import build, check_empty, request, run
from tests.support.families import SERVED, WINDOW, save_family
from tests.support.models import Reference, load_reference, make_soft_prompt, save_prompt

CHUNKS = (1, 9, 30, 1, 1, 18, 1)  # the first ones end within the window, the third is longer


@pytest.fixture(scope="module", params=sorted(SERVED))
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    kind, fields = SERVED[request.param]
    path = save_family(tmp_path_factory.mktemp("families") / kind, resolve(EMBEDDED_ALIAS).path, kind, **fields)
    return load_reference(str(path))


def start(reference: Reference) -> tuple[Engine, ModelInfo]:
    engine, ready = build(
        reference.path, num_blocks=18, block_size=8, max_batch_size=5, max_batch_tokens=11, max_model_len=128
    )
    return engine, ready.model


def test_log_probabilities_in_chunks(served: Reference) -> None:
    config = EngineConfig(model=served.path, dtype="float32", device="cpu", kv_cache_gib=0.01, max_model_len=128)
    runner = load(config, lambda *_: None).runner
    rng = random.Random(2)
    sequences = [[rng.randrange(3, 512) for _ in range(sum(CHUNKS))] for _ in range(2)]
    found, start = [], 0
    for count in CHUNKS:
        rows = [
            Row(
                start,
                tokens[start : start + count],
                list(range(8 * n, 8 * n + 8)),
                range(count),
                turned_for=sum(CHUNKS),
            )
            for n, tokens in enumerate(sequences)
        ]
        found.append(runner.forward(rows).view(2, count, -1).clone())
        start += count
    with torch.inference_mode():
        expected = served.model(torch.tensor(sequences)).logits
    torch.testing.assert_close(torch.cat(found, 1).log_softmax(-1), expected.log_softmax(-1), rtol=0, atol=1e-4)


def test_greedy_output_in_chunks_and_with_preemptions(served: Reference) -> None:
    engine, _ = start(served)
    rng = random.Random(5)
    prompts = [[rng.randrange(3, 512) for _ in range(rng.choice([1, 5, 20, 50]))] for _ in range(9)]
    received, preemptions, _ = run(engine, [request(f"r{i}", ids, 25) for i, ids in enumerate(prompts)])
    assert preemptions > 0
    for i, ids in enumerate(prompts):
        assert received[f"r{i}"] == served.generate(ids, 25, guess=received[f"r{i}"]), f"prompt {i}"
    check_empty(engine)


@pytest.mark.parametrize("kind", ["embeddings", "kv"])
@pytest.mark.parametrize("served", ["Gemma 3", "Mistral", "SmolLM3", "gpt-oss"], indirect=True)
def test_a_soft_prompt_is_seen_through_the_windows_only(served: Reference, kind: str, tmp_path: Path) -> None:
    """It is a prefix like any other: tokens of a layer with a window see no more of it than they would of a text."""
    engine, info = start(served)
    requests, prompts = [], {}
    for length in (WINDOW - 4, 2 * WINDOW + 3):
        prompts[length] = make_soft_prompt(kind, length, info, scale=0.5)
        path = save_prompt(prompts[length], tmp_path, f"p{length}")
        ref = SoftPromptRef(f"{length:064d}", str(path), length)
        requests += [request(f"{length}-{tokens}", list(range(3, 3 + tokens)), 20, ref) for tokens in (1, 6, 40)]
    received, _, _ = run(engine, requests)
    for asked in requests:
        length = asked.soft_prompt.num_virtual_tokens if asked.soft_prompt else 0
        guess = received[asked.request_id]
        assert guess == served.generate(asked.token_ids, 20, prompts[length], guess=guess), asked.request_id
    check_empty(engine)
