"""Scores are the log-probabilities that plain transformers gives, chunked, preempted, and behind soft prompts."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import msgspec
import pytest
import torch

from softbatch.prompt_store.soft_prompt_file import SoftPrompt
from softbatch.scheduler.protocol import AddRequest, PromptLogprobs, SamplingParams, SoftPromptRef
from tests.support.engines import build, check_empty, drain, make_request, tokens_of
from tests.support.models import Reference, load_reference, make_soft_prompt, save_prompt


@pytest.fixture(scope="module")
def llama(tiny_models: dict[str, str]) -> Reference:
    return load_reference(tiny_models["llama"])


@torch.inference_mode()
def expected_table(reference: Reference, token_ids: list[int], prompt: SoftPrompt | None) -> torch.Tensor:
    """Log-probabilities of whatever follows each of the tokens."""
    embed = reference.model.get_input_embeddings()
    inputs = embed(torch.tensor([token_ids]))
    virtual = 0
    if prompt is not None:
        virtual = prompt.manifest.num_virtual_tokens
        inputs = torch.cat([prompt.embeddings[None], inputs], dim=1)
    logits = reference.model(inputs_embeds=inputs).logits[0, virtual:]
    return torch.log_softmax(logits, -1)


def expected_scores(reference: Reference, token_ids: list[int], start: int, prompt: SoftPrompt | None) -> list[float]:
    table = expected_table(reference, token_ids, prompt)
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
                scores[sequence.request_id] = [score.logprob for score in sequence.scores]
    assert preempted > 0
    for name, (_, expected) in cases.items():
        assert scores[name] == pytest.approx(expected, abs=1e-4), name
    check_empty(engine)


@pytest.mark.parametrize("async_scheduling", ["off", "on"])
def test_a_scored_prompt_is_continued(tiny: Reference, tmp_path: Path, async_scheduling: str) -> None:
    """With alternatives; beside others, cut, preempted, and with few rows of logits in each step."""
    limits = {"max_batch_size": 5, "max_batch_tokens": 11, "max_model_len": 100}
    engine, ready = build(tiny.path, num_blocks=16, block_size=8, async_scheduling=async_scheduling, **limits)
    engine.scheduler.config = dataclasses.replace(engine.scheduler.config, max_scored_tokens=7)
    prompt = make_soft_prompt("embeddings", 13, ready.model)
    ref = SoftPromptRef("5" * 64, str(save_prompt(prompt, tmp_path, "p")), 13)
    rng = random.Random(9)
    shared = [rng.randrange(100, 40_000) for _ in range(20)]
    cases = {}
    for i in range(8):
        tokens = [shared[0]] if i == 7 else shared + [rng.randrange(100, 40_000) for _ in range(rng.randint(1, 20))]
        params = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True, logprobs=2)
        score = {"score_from": 1, "score_top": 3} if i != 4 else {}
        request = AddRequest(
            request_id=str(i), token_ids=tokens, params=params, soft_prompt=ref if i % 2 else None, **score
        )
        cases[request.request_id] = request
    found = drain(engine, list(cases.values()))
    assert engine.stats.preemptions_total > 0
    for name, request in cases.items():
        soft, outputs, ids = prompt if request.soft_prompt else None, found[name], request.token_ids
        told = [output.scores for output in outputs if output.scores is not None]
        assert len(told) == (request.score_from is not None)
        table = expected_table(tiny, [*ids, *tokens_of(outputs)], soft)
        assert tokens_of(outputs) == table[len(ids) - 1 : -1].argmax(-1).tolist()
        for scores in told:
            check_scores(scores, table, ids)
    check_empty(engine)


def check_scores(scores: list[PromptLogprobs], table: torch.Tensor, token_ids: list[int]) -> None:
    assert len(scores) == len(token_ids) - 1
    for score, row, token in zip(scores, table, token_ids[1:], strict=False):
        assert score.logprob == pytest.approx(float(row[token]), abs=1e-4)
        best = row.topk(3)
        assert score.top_logprobs == pytest.approx(best.values.tolist(), abs=1e-4)
        assert [float(row[each]) for each in score.top_ids] == pytest.approx(best.values.tolist(), abs=1e-4)
        above, below = (int((row > row[token] + off).sum()) + 1 for off in (1e-4, -1e-4))
        assert above <= score.rank <= below


def test_nothing_to_score_and_nothing_to_generate(llama: Reference) -> None:
    """Fills the prefix cache, and ends."""
    engine, _ = build(llama.path, num_blocks=16, block_size=8)
    tokens = list(range(500, 540))
    none = SamplingParams(max_tokens=0)
    first = AddRequest(request_id="first", token_ids=tokens, params=none, score_from=len(tokens))
    (*_, last) = drain(engine, [first])["first"]
    assert (last.token_ids, last.scores, last.finish_reason) == ([], [], "length")
    (output, *_) = drain(engine, [make_request("again", tokens)])["again"]
    assert output.num_cached == 32
    scored = AddRequest(request_id="scored", token_ids=tokens, params=none, score_from=1)
    (*_, last) = drain(engine, [scored])["scored"]
    assert last.num_cached == 0
    expected = expected_scores(llama, tokens, 1, None)
    assert [score.logprob for score in last.scores or []] == pytest.approx(expected, abs=1e-4)


def test_an_engine_that_resumes_does_not_score_again(llama: Reference) -> None:
    engine, _ = build(llama.path, num_blocks=16, block_size=8)
    request = make_request("a", list(range(500, 520)), max_tokens=5)
    request = msgspec.structs.replace(request, score_from=1, num_delivered=2)
    outputs = drain(engine, [request])["a"]
    assert [output.scores for output in outputs if output.scores is not None] == []
    assert len(tokens_of(outputs)) == 3
