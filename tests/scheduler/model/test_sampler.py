"""Sampling: filters, penalties, log-probabilities, and that nothing but a row itself decides its token."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from softbatch.scheduler.model.sampling import sampler
from softbatch.scheduler.model.sampling.adjustments import SampleInput, allowed_mask, ends_of_bad_words
from softbatch.scheduler.model.sampling.sampler import Sample, uniform
from softbatch.scheduler.model.sampling.sampler import sample as launch
from softbatch.scheduler.model.staging import ToHost
from softbatch.scheduler.protocol import SamplingParams

VOCAB = 3000  # more than the sampler's head of 1,024


def row(position: int = 5, tokens: list[int] | None = None, num_prompt: int = 2, **params: object) -> SampleInput:
    return SampleInput(SamplingParams(**params), tokens or [1, 2, 3], num_prompt, position)


def sample(logits: torch.Tensor, inputs: list[SampleInput]) -> list[Sample]:
    return launch(logits, inputs).read()


def random_logits(rows: int, seed: int = 0, spread: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * spread


def test_greedy_is_argmax() -> None:
    logits = random_logits(5)
    chosen = sample(logits, [row(temperature=0.0)] * 5)
    assert [c.token_id for c in chosen] == logits.argmax(-1).tolist()


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.7},
        {"temperature": 1.3, "top_k": 5},
        {"temperature": 1.0, "top_p": 0.6},
        {"temperature": 0.9, "top_k": 40, "top_p": 0.8},
        {"temperature": 1.0, "min_p": 0.2},
        {"temperature": 5.0, "top_p": 0.9999},  # needs more than the head
    ],
)
def test_allowed_tokens_and_frequencies_follow_transformers_warpers(params: dict[str, float]) -> None:
    logits = random_logits(1, seed=3)
    warpers = LogitsProcessorList([TemperatureLogitsWarper(float(params["temperature"]))])
    if "top_k" in params:
        warpers.append(TopKLogitsWarper(int(params["top_k"])))
    if "top_p" in params:
        warpers.append(TopPLogitsWarper(params["top_p"]))
    if "min_p" in params:
        warpers.append(MinPLogitsWarper(params["min_p"]))
    expected = torch.softmax(warpers(torch.tensor([[1]]), logits.clone())[0].double(), -1)
    draws = 4000
    inputs = [row(position=i, seed=11, **params) for i in range(draws)]
    counts = Counter(c.token_id for c in sample(logits.expand(draws, -1), inputs))
    assert all(expected[token] > 0 for token in counts)
    for token in expected.topk(5).indices.tolist():
        probability = float(expected[token])
        deviation = math.sqrt(draws * probability * (1 - probability)) + 1e-9
        assert abs(counts[token] - draws * probability) < 5 * deviation + 1


@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**63 - 1), others=st.integers(0, 6), at=st.integers(0, 6), position=st.integers(1, 10**6))
def test_a_row_does_not_depend_on_the_batch(seed: int, others: int, at: int, position: int) -> None:
    logits = random_logits(7, seed=seed % 1000)
    mine = row(position=position, seed=seed, temperature=0.8, top_p=0.9, top_k=seed % 50, logprobs=2)
    alone = sample(logits[at : at + 1], [mine])[0]
    rows = [
        row(position=i, seed=i, temperature=[0.0, 1.0, 2.0][i % 3], min_p=0.1 * (i % 2), repetition_penalty=1.0 + i / 5)
        for i in range(7)
    ]
    rows[at] = mine
    together = sample(logits, rows)[at]
    assert together.token_id == alone.token_id
    assert together.logprobs.logprob == pytest.approx(alone.logprobs.logprob, abs=1e-5)


def test_uniform_numbers_are_uniform_and_differ_by_seed_and_position() -> None:
    numbers = [uniform(seed, position) for seed in range(60) for position in range(60)]
    assert len(set(numbers)) == len(numbers)
    assert all(0 <= number < 1 for number in numbers)
    buckets = Counter(int(number * 10) for number in numbers)
    assert all(abs(buckets[i] - 360) < 100 for i in range(10))
    assert abs(sum(numbers) / len(numbers) - 0.5) < 0.02


@pytest.mark.parametrize("params", [{"temperature": 0.0}, {"temperature": 0.0, "logprobs": 2}, {"temperature": 1.0}])
def test_barred_tokens_are_not_chosen(params: dict[str, Any]) -> None:
    logits = random_logits(2)
    best = logits.argmax(-1).tolist()
    barred = dataclasses.replace(row(**params), barred=(best[0], 5))
    others = [sample(logits, [row(**params), row(**params)])[1], sample(logits, [barred, row(**params)])[1]]
    assert others[0] == others[1], "nobody else's"
    for seed in range(50):
        chosen = sample(logits[:1], [dataclasses.replace(row(**params, seed=seed), barred=(best[0], 5))])[0]
        assert chosen.token_id not in (best[0], 5)
        if params["temperature"] == 0:
            assert chosen.token_id == logits[0].topk(2).indices[1]
        if params.get("logprobs"):
            assert chosen.logprobs is not None
            assert chosen.logprobs.top_ids[0] == best[0], "log-probabilities are the model's own"


@pytest.mark.parametrize("params", [{"temperature": 0.0}, {"temperature": 0.0, "logprobs": 2}, {"temperature": 1.0}])
def test_biases_are_added_to_the_logits_of_their_own_row(params: dict[str, Any]) -> None:
    logits = random_logits(3, seed=6)
    free = sample(logits.clone(), [row(**params)] * 3)
    biased = logits.clone()
    biased[1, 7] += 4.5
    biased[1, 9] -= 2.0
    bias = {7: 4.5, 9: -2.0}
    assert sample(logits.clone(), [row(**params), row(**params, logit_bias=bias), row(**params)]) == [
        free[0],
        dataclasses.replace(sample(biased, [row(**params)] * 3)[1], logprobs=free[1].logprobs),
        free[2],
    ]
    for token, way in ((11, 100.0), (int(logits[0].argmax()), -100.0)):
        draws = [sample(logits[:1].clone(), [row(**params, seed=s, logit_bias={token: way})])[0] for s in range(20)]
        assert all((one.token_id == token) == (way > 0) for one in draws)


def test_only_allowed_tokens_are_chosen() -> None:
    logits = random_logits(2, seed=7)
    for allowed in ([3, 31, 32, VOCAB - 1], [*range(900, 2000)], [7], [*range(1024)]):
        mask = allowed_mask(allowed, VOCAB)
        for seed in range(40):
            mine = row(temperature=3.0, seed=seed, logprobs=1 if seed % 2 else None)
            free = sample(logits.clone(), [mine, mine])[1]
            chosen = sample(logits.clone(), [dataclasses.replace(mine, mask=mask), mine])
            assert chosen[0].token_id in allowed
            assert chosen[1] == free
        best = sample(logits.clone(), [dataclasses.replace(row(temperature=0.0), mask=mask), row(temperature=0.0)])[0]
        assert best.token_id == max(allowed, key=logits[0].__getitem__)


def test_allowed_tokens_that_the_model_lacks_are_left_out() -> None:
    """A tokenizer may have more tokens than the model, and its masks are as wide."""
    logits, mask = random_logits(1, seed=7)[:, : VOCAB - 9], allowed_mask([5, VOCAB - 1], VOCAB)
    for temperature in (0.0, 1.0):
        (chosen,) = sample(logits.clone(), [dataclasses.replace(row(temperature=temperature), mask=mask)])
        assert chosen.token_id == 5


@pytest.mark.parametrize(
    "params", [{}, {"top_p": 0.7}, {"top_k": 5, "top_p": 0.9}, {"min_p": 0.2}, {"logit_bias": {40: 2.0}}]
)
def test_few_allowed_tokens_are_drawn_as_often_as_if_all_were_looked_at(
    params: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    logits, mask = random_logits(1, seed=8), allowed_mask(range(20, 90), VOCAB)
    rows = [
        dataclasses.replace(row(position=i, seed=3, temperature=2.0, **params), mask=mask if i % 3 else None)
        for i in range(300)
    ]
    few = [one.token_id for one in sample(logits.repeat(300, 1), rows)]
    monkeypatch.setattr(sampler, "few_allowed", lambda mask, size: None)
    assert few == [one.token_id for one in sample(logits.repeat(300, 1), rows)]


def test_a_bad_word_is_barred_at_its_last_token() -> None:
    params = SamplingParams(bad_words=((5,), (1, 2), (1, 2, 3)))
    assert ends_of_bad_words(params, []) == [5]
    assert ends_of_bad_words(params, [1]) == [5, 2]
    assert ends_of_bad_words(params, [1, 2]) == [5, 3]
    assert ends_of_bad_words(params, [2, 9, 1]) == [5, 2]


def test_repetition_penalty_equals_transformers() -> None:
    logits = random_logits(1, seed=9)
    tokens = logits[0].topk(30).indices.tolist()
    expected = RepetitionPenaltyLogitsProcessor(1.8)(torch.tensor([tokens]), logits.clone()).argmax(-1)
    assert sample(logits, [row(tokens=tokens, temperature=0.0, repetition_penalty=1.8)])[0].token_id == int(expected)


def test_presence_and_frequency_penalties_count_output_tokens_only() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 7], logits[0, 8], logits[0, 9] = 3.0, 2.9, 2.5
    prompt_only = row(tokens=[7, 7, 7], num_prompt=3, temperature=0.0, presence_penalty=2.0)
    assert sample(logits, [prompt_only])[0].token_id == 7
    once = row(tokens=[1, 7], num_prompt=1, temperature=0.0, presence_penalty=0.2)
    assert sample(logits, [once])[0].token_id == 8
    often = row(tokens=[1, 7, 8, 8], num_prompt=1, temperature=0.0, frequency_penalty=0.3)
    assert sample(logits, [often])[0].token_id == 7
    more = row(tokens=[1, 7, 7, 8, 8], num_prompt=1, temperature=0.0, frequency_penalty=0.3)
    assert sample(logits, [more])[0].token_id == 9


def test_logprobs_are_the_models_own_before_any_filter() -> None:
    logits = random_logits(2, seed=4)
    expected = torch.log_softmax(logits, -1)
    chosen = sample(
        logits, [row(temperature=0.0, logprobs=3), row(temperature=2.0, top_k=3, repetition_penalty=1.5, logprobs=0)]
    )
    assert chosen[0].logprobs.top_ids == logits[0].topk(3).indices.tolist()
    assert chosen[0].logprobs.top_logprobs == pytest.approx(expected[0].topk(3).values.tolist(), abs=1e-5)
    assert chosen[1].logprobs.top_ids == []
    assert chosen[1].logprobs.logprob == pytest.approx(float(expected[1, chosen[1].token_id]), abs=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_fails_alone(bad: float) -> None:
    logits = random_logits(3)
    logits[1, 17] = bad
    chosen = sample(logits, [row(temperature=1.0, seed=1)] * 3)
    assert chosen[1].error is not None
    assert chosen[0].error is None
    assert chosen[2].error is None


def test_the_same_rows_in_any_mixture_of_filters_give_the_same_tokens() -> None:
    """Rows with and without filters, and one whose filter needs the whole vocabulary, are drawn side by side."""
    kinds: list[dict[str, float]] = [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 0.9, "top_p": 0.9},
        {"temperature": 9.0, "top_p": 0.99999},
        {"temperature": 1.0, "top_k": 2000},
        {"temperature": 1.0, "min_p": 0.05, "repetition_penalty": 1.3},
    ]
    logits = random_logits(24, seed=2)
    rows = [row(position=i, seed=i, logprobs=i % 4 or None, **kinds[i % 6]) for i in range(24)]
    together = sample(logits, rows)
    for i, one in enumerate(rows):
        alone = sample(logits[i : i + 1], [one])[0]
        assert alone.token_id == together[i].token_id
        assert (alone.logprobs is None) == (together[i].logprobs is None)
    ranks = (logits > logits.gather(1, torch.tensor([[c.token_id] for c in together]))).sum(-1)
    assert ranks[3::6].max() > 1024, "the whole vocabulary was never needed"


@pytest.mark.gpu
def test_one_wait_for_the_gpu_per_step(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = random_logits(8).cuda()
    rows = [
        row(position=i, temperature=i % 2, top_p=0.9, logprobs=2, repetition_penalty=1.1, logit_bias={i: 2.0})
        for i in range(8)
    ]
    rows[3] = dataclasses.replace(rows[3], mask=allowed_mask([5, 700], VOCAB))
    on_cpu = [one.token_id for one in sample(logits.cpu(), rows)]
    assert [one.token_id for one in sample(logits, rows)] == on_cpu
    reads, read = [0], ToHost.read

    def read_counted(numbers: ToHost) -> list[list[float]]:
        reads[0] += 1
        return read(numbers)

    monkeypatch.setattr(ToHost, "read", read_counted)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            sample(logits, rows)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not [w for w in caught if "synchroniz" in str(w.message)], "more was waited for than the one copy"
    assert reads == [1]


@pytest.mark.parametrize(
    "penalty", [{"repetition_penalty": 1.6}, {"presence_penalty": 0.7}, {"frequency_penalty": 0.4, "seed": 3}]
)
def test_a_token_that_only_the_device_knows_counts_like_the_others(penalty: dict[str, float]) -> None:
    logits = random_logits(1, seed=5)
    likely = logits[0].topk(4).indices.tolist()
    for newest in [*likely, 17]:
        tokens = [1, likely[0], likely[1], likely[1]]
        params = SamplingParams(temperature=0.0, logprobs=0, **penalty)
        known = SampleInput(params, [*tokens, newest], 1, 5)
        pending = SampleInput(params, tokens, 1, 5, torch.tensor([newest]))
        assert sample(logits, [pending]) == sample(logits, [known]), newest


def test_a_token_that_took_a_second_look_is_told_as_resampled() -> None:
    logits = random_logits(40, seed=2)
    rows = [row(position=i, seed=i, temperature=9.0, top_p=0.99999) for i in range(39)] + [row(temperature=0.0)]
    samples = launch(logits, rows)
    found = samples.read()
    assert [one.resampled for one in found] == [
        one.token_id != int(token) for one, token in zip(found, samples.tokens, strict=True)
    ]
    assert 10 < sum(one.resampled for one in found) <= 39
