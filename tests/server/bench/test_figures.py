"""Percentiles, goodput, arrivals and prompts: what the load generator computes without a server."""

from __future__ import annotations

import itertools
import json
import statistics

import pytest

from softbatch.server.bench.client import Exchange
from softbatch.server.bench.figures import Objective, figures_of, percentile
from softbatch.server.bench.load import Window, poisson_gaps
from softbatch.server.bench.workload import WORKLOADS, Requests, context_tokens


@pytest.mark.parametrize(
    ("values", "percent", "expected"),
    [
        ([7.0], 99, 7.0),
        ([4.0, 1.0, 3.0, 2.0], 50, 2.5),
        ([4.0, 1.0, 3.0, 2.0], 0, 1.0),
        ([4.0, 1.0, 3.0, 2.0], 100, 4.0),
        ([float(i) for i in range(101)], 99, 99.0),
        ([0.0, 10.0], 99, 9.9),
    ],
)
def test_percentile(values: list[float], percent: float, expected: float) -> None:
    assert percentile(values, percent) == pytest.approx(expected)


def test_no_percentile_of_nothing() -> None:
    with pytest.raises(ValueError):
        percentile([], 50)


def exchange(first: float, last: float, tokens: int = 11, error: str | None = None) -> Exchange:
    """Asked at 100 for 11 tokens."""
    return Exchange(100.0, 11, 100 + first, 100 + last, 100 + last, tokens + 2, None if error else tokens, error)


def test_figures_of_a_window() -> None:
    exchanges = [exchange(0.5, 1.5), exchange(1.0, 4.0), exchange(3.0, 3.5), exchange(0.1, 0.2, error="status 500: no")]
    figures = figures_of(Window(100.0, 110.0, 45, exchanges, cut_off=2), Objective(2.0, 0.2), by_events=False)
    assert (figures.finished, figures.failed, figures.cut_off, figures.wrong_length) == (3, 1, 2, 0)
    assert figures.output_tokens_per_second == pytest.approx(3.3)
    assert figures.requests_per_second == pytest.approx(0.3)
    # The second is too slow between its tokens, the third has its first token too late.
    assert figures.goodput == pytest.approx(0.1)
    assert figures.first_token_ms is not None
    assert figures.first_token_ms.p50 == pytest.approx(1000)
    assert figures.per_token_ms is not None
    assert figures.per_token_ms.mean == pytest.approx((100 + 300 + 50) / 3)
    assert figures.whole_ms is not None
    assert figures.whole_ms.p50 == pytest.approx(3500)
    assert figures.errors == {"status 500: no": 1}


def test_a_window_counts_tokens_of_requests_that_began_or_ended_outside() -> None:
    """26 events of finished requests carried 22 tokens; 130 events came in the window."""
    figures = figures_of(Window(100.0, 110.0, 130, [exchange(1, 2), exchange(1, 2)]), Objective(), by_events=True)
    assert figures.output_tokens_per_second == pytest.approx(11.0)


def test_outputs_of_another_length_are_told() -> None:
    figures = figures_of(Window(0.0, 1.0, 9, [exchange(1, 2, tokens=7)]), Objective(), by_events=False)
    assert figures.wrong_length == 1


def test_nothing_finished() -> None:
    figures = figures_of(Window(0.0, 2.0, 6, [], cut_off=1), Objective(), by_events=True)
    assert figures.first_token_ms is None
    assert figures.output_tokens_per_second == 3.0
    assert figures.goodput == 0


def test_poisson_arrivals_repeat_with_their_seed() -> None:
    gaps = list(itertools.islice(poisson_gaps(4.0, seed=7), 20_000))
    assert gaps == list(itertools.islice(poisson_gaps(4.0, seed=7), 20_000))
    assert gaps[:10] != list(itertools.islice(poisson_gaps(4.0, seed=8), 10))
    # Of an exponential distribution the deviation equals the mean.
    assert statistics.mean(gaps) == pytest.approx(0.25, rel=0.03)
    assert statistics.stdev(gaps) == pytest.approx(0.25, rel=0.03)


def test_prompts_repeat_with_their_seed_and_share_no_prefix() -> None:
    def prompts(seed: int) -> list[list[int]]:
        requests = Requests(WORKLOADS["plain"], "m", seed)
        return [json.loads(requests.body(index))["prompt"] for index in range(200)]

    assert prompts(1) == prompts(1)
    both = prompts(1) + prompts(2)
    assert {len(prompt) for prompt in both} == {256}
    assert len({tuple(prompt[:4]) for prompt in both}) == len(both)


def test_contexts_are_the_same_for_every_seed_and_stand_in_front() -> None:
    work = WORKLOADS["many"]
    starts = set()
    for seed, index in itertools.product((1, 2), range(300)):
        prompt = json.loads(Requests(work, "m", seed).body(index))["prompt"]
        assert len(prompt) == work.context_tokens + work.input_tokens
        starts.add(tuple(prompt[: work.context_tokens]))
    known = {context_tokens(index, work.context_tokens, 32_000) for index in range(work.contexts)}
    assert starts <= known
    assert len(starts) > 250  # of 400, drawn 600 times


def test_a_soft_prompt_takes_the_place_of_its_context() -> None:
    requests = Requests(WORKLOADS["hot"], "m", 0, soft_prompt="context-{index}")
    bodies = [json.loads(requests.body(index)) for index in range(50)]
    assert {body["soft_prompt"] for body in bodies} == {"context-0", "context-1"}
    assert {len(body["prompt"]) for body in bodies} == {32}
