"""A light owner keeps its part of the pace beside a heavy one, wherever rows cost time."""

from __future__ import annotations

from statistics import median

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from softbatch.scheduler.decode_shares import DecodeCost, who_decodes
from softbatch.scheduler.scheduler import Scheduler
from softbatch.scheduler.sequence import Sequence
from tests.support.fake_runner import FakeRunner, make_scheduler, request


class Site:
    """A scheduler whose steps take `fixed` seconds, and `each` a row and a quarter of that a token of a prefill."""

    def __init__(self, fixed: float, each: float) -> None:
        self.scheduler: Scheduler = make_scheduler(
            max_batch_size=32, max_batch_tokens=1024, num_blocks=4000, max_queue_size=1000, step_target=0.05
        )
        self.runner, self.fixed, self.each = FakeRunner(self.scheduler), fixed, each
        self.now, self.asked, self.tokens = 0.0, 0, 0

    def ask(self, owner: str, weight: float = 1.0) -> str:
        self.asked += 1
        name = f"{owner}{self.asked}"
        tokens = [self.asked] * 8
        length = 32 if owner == "light" else 16 + self.asked * 7 % 33
        self.scheduler.add(request(name, tokens=tokens, max_tokens=length, owner=owner, weight=weight))
        return name

    def step(self) -> set[str]:
        """Names of those that ended."""
        step = self.scheduler.schedule()
        rows = sum(row.num_tokens == 1 for row in step.rows)
        seconds = self.fixed + self.each * (rows + (step.num_tokens - rows) / 4)
        self.now += seconds
        outputs = self.scheduler.postprocess(step, self.runner.run(step))
        self.scheduler.observe(step, seconds)
        self.scheduler.check_integrity()
        self.tokens += sum(len(output.token_ids) for output in outputs)
        return {output.request_id for output in outputs if output.finish_reason}

    def latency(self, heavy_clients: int, weight: float = 1.0) -> float:
        """The median of a light owner's, who asks one request at a time."""
        for _ in range(heavy_clients):
            self.ask("heavy")
        taken = []
        for turn in range(9):
            began, name = self.now, self.ask("light", weight)
            ended: set[str] = set()
            while name not in ended:
                ended = self.step()
                for other in ended - {name}:
                    assert other.startswith("heavy")
                    self.ask("heavy")
            taken.append(self.now - began)
            for _ in range(turn % 3):
                for _ in self.step():
                    self.ask("heavy")
        return median(taken)


@pytest.mark.parametrize(("fixed", "each"), [(0.005, 0.0016), (0.02, 0.001)])
def test_a_light_owner_takes_at_most_twice_as_long_as_alone(fixed: float, each: float) -> None:
    alone = Site(fixed, each).latency(0)
    beside = Site(fixed, each).latency(50)
    assert beside <= 2 * alone


def test_where_rows_cost_nothing_nobody_waits() -> None:
    site = Site(0.01, 0.0)
    site.latency(50)
    assert site.scheduler.schedule().num_tokens >= 31


def sequences(counts: list[int], weights: list[float]) -> list[Sequence]:
    return [
        Sequence(request(f"{owner}-{n}", owner=str(owner), weight=weight), n)
        for owner, (count, weight) in enumerate(zip(counts, weights, strict=True))
        for n in range(count)
    ]


COUNTS = st.lists(st.tuples(st.integers(1, 20), st.sampled_from([0.5, 1.0, 4.0])), min_size=1, max_size=5)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(COUNTS, st.floats(0, 0.1), st.floats(0.0001, 0.01))
def test_every_owner_keeps_its_part_of_the_pace_and_everybody_has_a_turn(owners, fixed, each):
    counts, weights = [count for count, _ in owners], [weight for _, weight in owners]
    decoding, cost = sequences(counts, weights), DecodeCost()
    for rows in range(1, 60):
        cost.observe(rows, fixed + each * rows)
    served: dict[str, int] = {}
    for step in range(100):
        chosen = who_decodes(decoding, cost, step)
        if chosen is None:
            return
        assert 0 < len(chosen) < len(decoding)
        seconds = fixed + each * len(chosen)
        for sequence in chosen:
            served[sequence.request_id] = served.get(sequence.request_id, 0) + 1
    paces = [(fixed + each * count) / weight for count, weight in zip(counts, weights, strict=True)]
    longest = min(paces) * sum(weights)
    least = max(
        fixed + each * (count + len(counts) - 1) for count in counts
    )  # somebody's own rows, and one of each other
    assert seconds <= max(longest, least) * 1.01 or len(chosen) <= len(counts)
    assert len(served) == len(decoding), "somebody never had a turn"
    for owner in range(len(counts)):
        had = [served[s.request_id] for s in decoding if s.owner == str(owner)]
        assert max(had) - min(had) <= 1


def test_nobody_waits_before_the_cost_is_known_but_in_a_trial_now_and_then() -> None:
    cost, decoding = DecodeCost(), sequences([1, 20], [1, 1])
    for _ in range(100):
        assert [who_decodes(decoding, cost, step) for step in range(1, 16)] == [None] * 15
        cost.observe(21, 0.05)
    trial = who_decodes(decoding, cost, 16)
    assert trial is not None
    assert len(trial) == 11
    cost.observe(11, 0.03)
    assert cost.line() == pytest.approx((0.008, 0.002))


@pytest.mark.parametrize(("fixed", "each"), [(0.2, 0.001), (0.015, 0.001)])
def test_an_owner_of_most_of_the_weight_keeps_all_of_its_rows(fixed: float, each: float) -> None:
    """Its own rows alone take longer than its part of the pace would allow: to hold them up would serve nobody."""
    cost = DecodeCost()
    for rows in range(1, 60):
        cost.observe(rows, fixed + each * rows)
    decoding = sequences([10, 1], [10.0, 1.0])
    assert all(who_decodes(decoding, cost, step) is None for step in range(20))


def test_weights_however_far_apart_leave_everybody_a_turn() -> None:
    cost = DecodeCost()
    for rows in range(1, 60):
        cost.observe(rows, 0.01 * rows)
    decoding = sequences([5, 9, 9], [1000.0, 1e-17, 1e-17])
    served = {s.request_id for step in range(20) for s in who_decodes(decoding, cost, step) or decoding}
    assert len(served) == len(decoding)


def test_rows_of_other_priorities_take_no_turns() -> None:
    cost = DecodeCost()
    for rows in range(1, 60):
        cost.observe(rows, 0.01 * rows)
    urgent = [Sequence(request(f"u{n}", owner="u", priority=-10), n) for n in range(20)]
    background = Sequence(request("b", owner="b", priority=1000), 20)
    assert who_decodes([*urgent, background], cost, 1) is None
