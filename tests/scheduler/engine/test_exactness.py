"""Greedy output in float32 equals plain transformers, token for token, however the engine batches it."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from softbatch.prompt_store.soft_prompt_file import SoftPrompt
from softbatch.scheduler.engine.engine import Engine
from softbatch.scheduler.model.loader import spec_of
from softbatch.scheduler.protocol import (
    SoftPromptRef,
)
from tests.support.engines import build, check_empty, request, run, trained_like
from tests.support.models import Reference, make_soft_prompt, sample_texts, save_prompt

LENGTHS = (1, 7, 16, 33, 64)
EXAMPLES = Path(__file__).parents[3] / "examples"


def ways() -> list[object]:
    """Where the engine runs, with and without async scheduling. transformers, the reference, runs on the CPU."""
    return [
        pytest.param({"device": device, "async_scheduling": mode}, id=f"{device}-{mode}", marks=marks)
        for device, marks in (("cpu", ()), ("cuda", pytest.mark.gpu))
        for mode in ("off", "on")
    ]


@pytest.fixture(params=ways())
def way(request: pytest.FixtureRequest) -> dict[str, str]:
    return request.param


def test_forty_prompts_with_cancellations_chunks_and_preemptions(smollm2: Reference, way: dict[str, str]) -> None:
    engine, _ = build(
        smollm2.path,
        num_blocks=34,
        block_size=4,
        max_batch_size=7,
        max_batch_tokens=19,
        max_model_len=128,
        max_queue_size=100,
        **way,
    )
    rng = random.Random(3)
    prompts = [smollm2.tokenizer(text)["input_ids"] for text in sample_texts(44)]
    lengths = [rng.choice([3, 12, 24, 40]) for _ in prompts]
    cancelled = frozenset(f"r{i}" for i in rng.sample(range(44), 4))
    requests = [request(f"r{i}", ids, lengths[i]) for i, ids in enumerate(prompts)]
    received, preemptions, chunks = run(engine, requests, cancel=cancelled)
    assert preemptions > 0
    assert chunks >= 10
    for i, ids in enumerate(prompts):
        found = received[f"r{i}"]
        length = len(found) if f"r{i}" in cancelled else lengths[i]
        assert found == smollm2.generate(ids, length, guess=found), f"prompt {i}"
    check_empty(engine)


def test_many_questions_about_two_long_contexts(smollm2: Reference, way: dict[str, str]) -> None:
    """Enough sequences share enough blocks for attention to walk them once for all, behind one common start."""
    engine, _ = build(
        smollm2.path,
        num_blocks=260,
        max_batch_size=14,
        max_batch_tokens=200,
        max_model_len=512,
        max_queue_size=100,
        **way,
    )
    text = smollm2.tokenizer((EXAMPLES / "manual" / "context.md").read_text())["input_ids"]
    contexts = [text[:330], text[:100] + text[200:420]]
    questions = [smollm2.tokenizer(text)["input_ids"][: 4 + i] for i, text in enumerate(sample_texts(12))]
    prompts = [contexts[i % 2] + ids for i, ids in enumerate(questions)]
    received, _, _ = run(engine, [request(f"r{i}", ids, 8) for i, ids in enumerate(prompts)])
    for i, ids in enumerate(prompts):
        shared = len(contexts[i % 2])
        assert received[f"r{i}"] == smollm2.generate(ids, 8, guess=received[f"r{i}"], shared=shared), f"prompt {i}"
    check_empty(engine)


@pytest.mark.parametrize("kind", ["embeddings", "kv"])
def test_soft_prompts_of_every_length_in_one_batch(
    smollm2: Reference, kind: str, tmp_path: Path, way: dict[str, str]
) -> None:
    engine, ready = build(
        smollm2.path,
        num_blocks=60,
        max_batch_size=6,
        max_batch_tokens=23,
        max_model_len=160,
        max_queue_size=100,
        **way,
    )
    info = ready.model
    check_soft_prompts(engine, smollm2, {n: trained_like(kind, n, smollm2, info) for n in LENGTHS}, tmp_path)


@pytest.mark.parametrize("kind", ["embeddings", "kv"])
def test_soft_prompts_on_other_architectures(tiny: Reference, kind: str, tmp_path: Path, way: dict[str, str]) -> None:
    engine, ready = build(
        tiny.path,
        num_blocks=48,
        block_size=8,
        max_batch_size=5,
        max_batch_tokens=17,
        max_model_len=128,
        **way,
    )
    prompts = {n: make_soft_prompt(kind, n, ready.model, scale=0.5) for n in LENGTHS}
    check_soft_prompts(engine, tiny, prompts, tmp_path)


def test_other_architectures_with_chunks_and_preemptions(tiny: Reference, way: dict[str, str]) -> None:
    engine, _ = build(
        tiny.path,
        num_blocks=18,
        block_size=8,
        max_batch_size=5,
        max_batch_tokens=11,
        max_model_len=128,
        **way,
    )
    rng = random.Random(5)
    prompts = [[rng.randrange(100, 40_000) for _ in range(rng.choice([1, 5, 20, 50]))] for _ in range(40)]
    received, preemptions, _ = run(engine, [request(f"r{i}", ids, 30) for i, ids in enumerate(prompts)])
    assert preemptions > 0
    for i, ids in enumerate(prompts):
        assert received[f"r{i}"] == tiny.generate(ids, 30, guess=received[f"r{i}"]), f"prompt {i}"
    check_empty(engine)


@pytest.mark.parametrize("kind", [None, "embeddings", "kv"])
def test_a_wrong_guess_is_not_believed(tiny: Reference, kind: str | None) -> None:
    """What the answers above are compared with is transformers' own, whatever the engine says."""
    soft_prompt = None
    if kind is not None:
        soft_prompt = make_soft_prompt(kind, 9, spec_of("tiny", tiny.model, tiny.tokenizer), scale=0.5)
    ids = [5, 300, 77]
    right = Reference(tiny.path, tiny.model, tiny.tokenizer).generate(ids, 8, soft_prompt)
    guesses = [right, right[:-1], [*right[:-1], right[-1] + 1], [right[0] + 1, *right[1:]], [*right[:3], 2], []]
    for guess in guesses:
        fresh = Reference(tiny.path, tiny.model, tiny.tokenizer)
        for shared in (0, 2):
            assert fresh._is_greedy(ids, 8, soft_prompt, guess, shared) == (guess == right)
        assert fresh.generate(ids, 8, soft_prompt, guess=guess) == right


def check_soft_prompts(engine: Engine, reference: Reference, prompts: dict[int, SoftPrompt], where: Path) -> None:
    """Three requests per soft prompt and three without, all mixed."""
    refs: dict[int, SoftPromptRef | None] = {0: None}
    for length, prompt in prompts.items():
        path = save_prompt(prompt, where, f"p{length}")
        refs[length] = SoftPromptRef(f"{length:064d}", str(path), length)
    requests, asked = [], {}
    for length, ref in refs.items():
        for index, text in enumerate(sample_texts(3)):
            ids = reference.tokenizer(text)["input_ids"]
            name = f"{length}-{index}"
            requests.append(request(name, ids, 12, ref))
            asked[name] = (ids, 12, prompts.get(length))
    received, _, _ = run(engine, requests)
    expected = {name: reference.generate(*question, guess=received[name]) for name, question in asked.items()}
    for name, tokens in expected.items():
        assert received[name] == tokens, name
    plain = [expected[f"0-{i}"] for i in range(3)]
    assert any([expected[f"{n}-{i}"] for i in range(3)] != plain for n in prompts), "the soft prompts change nothing"
    check_empty(engine)
