"""longrope, sequence by sequence: positions turn as transformers turns them, whatever else a step computes."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from softbatch.prompt_store.soft_prompt_file import SoftPrompt
from softbatch.scheduler.engine.engine import Engine
from softbatch.scheduler.model import loader
from softbatch.scheduler.model.source import EMBEDDED_ALIAS, resolve
from softbatch.scheduler.protocol import AddRequest, ModelInfo, SamplingParams, SoftPromptRef
from tests.support.engines import build, check_empty, drain, request, run, tokens_of
from tests.support.families import longrope, save_family
from tests.support.models import Reference, load_reference, make_soft_prompt, save_prompt
from tests.support.pooling import embedding_request, pooled_states

ORIGINAL = 33
OUTPUT = 30
AROUND = (ORIGINAL - 1, ORIGINAL, ORIGINAL + 1)
KINDS: dict[str, dict[str, Any]] = {
    "llama": {"rope_parameters": longrope(4, ORIGINAL)},
    "phi3": {
        "rope_parameters": longrope(2, ORIGINAL) | {"partial_rotary_factor": 0.5},
        "original_max_position_embeddings": ORIGINAL,
    },
}


@pytest.fixture(scope="module", params=sorted(KINDS))
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    path = tmp_path_factory.mktemp("longrope") / request.param
    save_family(path, resolve(EMBEDDED_ALIAS).path, request.param, **KINDS[request.param])
    return load_reference(str(path))


@pytest.fixture(params=["one call", "layer by layer"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "layer by layer":
        monkeypatch.setattr(loader, "supports", lambda *_: False)


def start(reference: Reference, **options: Any) -> tuple[Engine, ModelInfo]:
    limits = {"num_blocks": 26, "block_size": 8, "max_batch_size": 5, "max_batch_tokens": 11, "max_model_len": 128}
    engine, ready = build(reference.path, **limits | options)
    return engine, ready.model


def prompts_of(seed: int) -> list[list[int]]:
    """Most of one text, so that long and short prompts begin with the same tokens."""
    rng = random.Random(seed)
    text, other = ([rng.randrange(3, 512) for _ in range(90)] for _ in range(2))
    return [text[:length] for length in (3, 24, *AROUND, 40, 90)] + [other[:length] for length in (30, 60)]


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(("seed", "mode"), [(1, "off"), (2, "on")])
def test_greedy_output_around_the_original_length(served: Reference, seed: int, mode: str) -> None:
    """In chunks, beside sequences of other lengths and with preemptions, then from what the first time has cached."""
    engine, info = start(served, num_blocks=18, async_scheduling=mode)
    assert info.max_model_len == 128
    prompts, preempted = prompts_of(seed), 0
    for again in range(2):
        requests = [request(f"{again}-{len(ids)}", ids, OUTPUT) for ids in prompts]
        received, preemptions, _ = run(engine, requests, seed=seed)
        preempted += preemptions
        for ids in prompts:
            assert received[f"{again}-{len(ids)}"] == served.generate(ids, OUTPUT), f"{len(ids)} tokens"
    assert preempted > 0
    assert engine.stats.preemptions_total > 0, "no sequence had to give up its blocks"
    check_empty(engine)


def test_the_whole_length_is_the_default(served: Reference) -> None:
    engine, ready = build(served.path, num_blocks=40)
    assert ready.model.max_model_len == 256
    engine.close()


def test_what_was_delivered_is_gone_on_from(served: Reference) -> None:
    """By an engine that has computed none of it: before the original length, at it and behind it."""
    engine, _ = start(served)
    prompt = prompts_of(3)[1]
    whole = served.generate(prompt, 20)
    for count in (1, 8, 9, 10, 11, 19):
        resumed = AddRequest(
            request_id=f"r{count}",
            token_ids=prompt + whole[:count],
            num_delivered=count,
            params=SamplingParams(max_tokens=20, temperature=0.0),
            cache_salt=str(count),
        )
        assert tokens_of(drain(engine, [resumed])[f"r{count}"]) == whole[count:], count


@torch.inference_mode()
def behind(reference: Reference, prompt: SoftPrompt, ids: list[int], count: int) -> list[int]:
    """Greedy output behind a prefix, in one forward for the prompt and one for each token."""
    model, cache = reference.model, None
    if prompt.manifest.kind == "embeddings":
        inputs = {"inputs_embeds": torch.cat([prompt.embeddings[None], model.get_input_embeddings()(_row(ids))], 1)}
    else:
        inputs, cache = {"input_ids": _row(ids)}, reference._cache_of(prompt)
    found: list[int] = []
    while len(found) < count:
        output = model(**inputs, past_key_values=cache, use_cache=True)
        found.append(int(output.logits[0, -1].argmax()))
        inputs, cache = {"input_ids": _row(found[-1:])}, output.past_key_values
    return found


def _row(ids: list[int]) -> torch.Tensor:
    return torch.tensor([ids])


@pytest.mark.parametrize("kind", ["kv", "embeddings"])
def test_a_soft_prompt_counts_as_the_tokens_it_is(served: Reference, kind: str, tmp_path: Path) -> None:
    """Its keys are as they are given; embeddings turn with the prompt behind them, though others share them."""
    engine, info = start(served, max_model_len=144)
    virtual = 13
    prompt = make_soft_prompt(kind, virtual, info, scale=0.5)
    ref = SoftPromptRef("a" * 64, str(save_prompt(prompt, tmp_path, kind)), virtual, has_keys=kind == "kv")
    prompts = prompts_of(4)
    prompts += [prompts[-1][: length - virtual] for length in AROUND]
    requests = [
        AddRequest(
            request_id=f"r{len(ids)}",
            token_ids=ids,
            soft_prompt=ref,
            params=SamplingParams(max_tokens=OUTPUT, temperature=0.0, ignore_eos=True),
        )
        for ids in prompts
    ]
    received, _, _ = run(engine, requests)
    for ids in prompts:
        assert received[f"r{len(ids)}"] == behind(served, prompt, ids, OUTPUT), f"{len(ids)} tokens"
    resident = {found.ref.sha256 for found in engine.scheduler.soft_prompts.all()}
    assert kind == "embeddings" or resident == {"a" * 64}, "keys that are given do not turn: they are there once"
    assert engine.scheduler.soft_prompts.ready() == ["a" * 64]
    engine.scheduler.soft_prompts.evict_when_unused("a" * 64)
    assert not engine.scheduler.soft_prompts.all()
    check_empty(engine)


@pytest.mark.usefixtures("way")
def test_scores_and_embeddings(served: Reference) -> None:
    engine, _ = start(served)
    prompts = prompts_of(5)
    scored = [
        AddRequest(
            request_id=f"s{len(ids)}", token_ids=ids, params=SamplingParams(max_tokens=0), score_from=1, score_top=1
        )
        for ids in prompts
    ]
    outputs = drain(engine, [*scored, *(embedding_request(f"e{len(ids)}", ids, "mean") for ids in prompts)])
    for ids in prompts:
        (scores,) = (output.scores for output in outputs[f"s{len(ids)}"] if output.scores)
        with torch.inference_mode():
            table = served.model(_row(ids)).logits[0].log_softmax(-1)
        expected = [float(table[i - 1, token]) for i, token in enumerate(ids) if i]
        assert [entry.logprob for entry in scores] == pytest.approx(expected, abs=1e-4)
        (embedding,) = (output.embedding for output in outputs[f"e{len(ids)}"] if output.embedding)
        assert embedding == pytest.approx(pooled_states(served, ids, "mean"), abs=1e-4)
