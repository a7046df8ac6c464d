"""A light owner keeps its part of the pace beside a heavy one, wherever rows cost time."""

from __future__ import annotations

from statistics import median

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from softbatch.scheduler.decode_shares import SharedPace, Shares, StepCost, who_decodes
from softbatch.scheduler.scheduler import Scheduler
from softbatch.scheduler.sequence import Sequence
from softbatch.scheduler.step import Step, StepResult
from softbatch.scheduler.waiting_queue import WaitingQueue
from tests.support.fake_runner import FakeRunner, make_scheduler, next_token, request


class Site:
    """A scheduler whose steps take `fixed` seconds, and `each` a row and a quarter of that a token of a prefill."""

    def __init__(self, fixed: float, each: float, prompt_tokens: int = 8) -> None:
        self.scheduler: Scheduler = make_scheduler(
            max_batch_size=32,
            max_batch_tokens=1024,
            max_model_len=8192,
            num_blocks=2000,
            block_size=16,
            max_queue_size=1000,
            step_target=0.05,
        )
        self.fixed, self.each = fixed, each
        self.now, self.asked, self.tokens, self.prompt_tokens = 0.0, 0, 0, prompt_tokens

    def ask(self, owner: str, weight: float = 1.0) -> str:
        self.asked += 1
        name = f"{owner}{self.asked}"
        tokens = [self.asked] * self.prompt_tokens
        length = 32 if owner == "light" else 16 + self.asked * 7 % 33
        self.scheduler.add(request(name, tokens=tokens, max_tokens=length, owner=owner, weight=weight))
        return name

    def step(self) -> set[str]:
        """Names of those that ended."""
        step = self.scheduler.schedule()
        rows = sum(row.num_tokens == 1 for row in step.rows)
        seconds = self.fixed + self.each * (rows + (step.num_tokens - rows) / 4)
        self.now += seconds
        tokens = {row.sequence.request_id: 1 for row in step.rows if row.end == row.sequence.length}
        self.scheduler.mark_in_flight(step)
        outputs = self.scheduler.postprocess(step, StepResult(tokens, {}, {}, {}, {}))
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


@pytest.mark.parametrize("prompt_tokens", [8, 64])
@pytest.mark.parametrize(("fixed", "each"), [(0.005, 0.0016), (0.02, 0.001), (0.005, 0.0005), (0.05, 0.008)])
def test_a_light_owner_takes_at_most_twice_as_long_as_alone(fixed: float, each: float, prompt_tokens: int) -> None:
    alone = Site(fixed, each, prompt_tokens).latency(0)
    beside = Site(fixed, each, prompt_tokens).latency(50)
    assert beside <= 2 * alone


def test_beside_prompts_alone_an_owner_keeps_its_pace_and_they_go_on() -> None:
    """Somebody who only has prompts read, and no row to leave out."""
    site, taken = Site(0.005, 0.001), []
    alone = site.latency(0)
    for number in range(2):
        site.scheduler.add(request(f"long{number}", tokens=[100 + number] * 5000, max_tokens=1, owner="heavy"))
    ended: set[str] = set()
    while "long1" not in ended:
        began, name = site.now, site.ask("light")
        while name not in ended:
            ended |= site.step()
        taken.append(site.now - began)
    assert len(taken) > 8
    assert max(taken[1:]) <= 2 * alone, "but for the first prompt's first chunks"


def test_an_owner_without_a_slot_gets_one_of_whoever_has_most() -> None:
    scheduler = make_scheduler(max_batch_size=4, max_batch_tokens=64, num_blocks=400)
    runner = FakeRunner(scheduler)
    received: dict[str, list[int]] = {}
    asked = [request(f"heavy{n}", tokens=[n + 1] * 5, max_tokens=30, owner="heavy") for n in range(8)]

    def step() -> Step:
        made = scheduler.schedule()
        for output in scheduler.postprocess(made, runner.run(made)):
            received.setdefault(output.request_id, []).extend(output.token_ids)
        scheduler.check_integrity()
        return made

    for one in asked:
        assert scheduler.add(one) is None
    for _ in range(5):
        step()
    for owner in ("light", "other", "third", "fourth"):
        asked.append(request(owner, tokens=[len(owner)] * 6, max_tokens=9, owner=owner))
        assert scheduler.add(asked[-1]) is None
    assert step().report.preempted == ["heavy3", "heavy2", "heavy1"]
    assert {sequence.owner for sequence in scheduler.running} == {"heavy", "light", "other", "third"}
    assert scheduler.stats(1).preemptions_total == 0
    assert not step().report.preempted, "the last slot of an owner is nobody else's"
    while scheduler.has_work:
        step()
    for one in asked:
        tokens = list(one.token_ids)
        for _ in range(one.params.max_tokens):
            tokens.append(next_token(tokens))
        assert received[one.request_id] == tokens[len(one.token_ids) :]


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


def by_owner(decoding: list[Sequence]) -> dict[str, list[Sequence]]:
    owners: dict[str, list[Sequence]] = {}
    for sequence in decoding:
        owners.setdefault(sequence.owner, []).append(sequence)
    return owners


COUNTS = st.lists(st.tuples(st.integers(1, 20), st.sampled_from([0.5, 1.0, 4.0])), min_size=1, max_size=5)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(COUNTS, st.floats(0, 0.1), st.floats(0.0001, 0.01))
def test_every_owner_keeps_its_part_of_the_pace_and_everybody_has_a_turn(
    owners: list[tuple[int, float]], fixed: float, each: float
) -> None:
    counts, weights = [count for count, _ in owners], [weight for _, weight in owners]
    decoding, cost = sequences(counts, weights), StepCost()
    for rows in range(1, 60):
        cost.observe(rows, fixed + each * rows)
    served: dict[str, int] = {}
    num_chosen, seconds = 0, 0.0
    for step in range(100):
        chosen = who_decodes(by_owner(decoding), cost, step)
        if chosen is None:
            return
        num_chosen = len(chosen)
        assert 0 < num_chosen < len(decoding)
        seconds = fixed + each * num_chosen
        for sequence in chosen:
            served[sequence.request_id] = served.get(sequence.request_id, 0) + 1
    paces = [(fixed + each * count) / weight for count, weight in zip(counts, weights, strict=True)]
    longest = min(paces) * sum(weights)
    least = max(
        fixed + each * (count + len(counts) - 1) for count in counts
    )  # somebody's own rows, and one of each other
    assert seconds <= max(longest, least) * 1.01 or num_chosen <= len(counts)
    assert len(served) == len(decoding), "somebody never had a turn"
    for owner in range(len(counts)):
        had = [served[s.request_id] for s in decoding if s.owner == str(owner)]
        assert max(had) - min(had) <= 1


@settings(max_examples=50, deadline=None, derandomize=True)
@given(COUNTS, st.floats(0, 0.1), st.floats(0.0001, 0.01), st.floats(0.001, 10))
def test_of_an_owner_for_whose_sake_others_wait_no_row_waits(
    owners: list[tuple[int, float]], fixed: float, each: float, late: float
) -> None:
    decoding, cost = sequences([count for count, _ in owners], [weight for _, weight in owners]), StepCost()
    for rows in range(1, 60):
        cost.observe(rows, fixed + each * rows)
    on_time = who_decodes(by_owner(decoding), cost, 0) or decoding
    chosen = who_decodes(by_owner(decoding), cost, 0, late=late) or decoding
    assert len(chosen) <= len(on_time)
    lightest = min(range(len(owners)), key=lambda owner: owners[owner][0] / owners[owner][1])
    all_rows, before, now = [sum(s.owner == str(lightest) for s in some) for some in (decoding, on_time, chosen)]
    assert now in (all_rows, before)


def test_nobody_waits_before_the_cost_is_known_but_in_a_trial_now_and_then() -> None:
    cost, decoding = StepCost(), by_owner(sequences([1, 20], [1, 1]))
    for _ in range(100):
        assert [who_decodes(decoding, cost, step) for step in range(1, 16)] == [None] * 15
        cost.observe(21, 0.05)
    trial = who_decodes(decoding, cost, 16)
    assert trial is not None
    assert len(trial) == 2
    cost.observe(2, 0.012)
    assert cost.line() == pytest.approx((0.008, 0.002))
    for _ in range(200):
        cost.observe(2, 0.012)
    assert cost.line() == pytest.approx((0.008, 0.002)), "what a row costs is still known"
    cost.observe(2, 0.012 + 50 * 0.0003, prefilled=50)
    assert cost.prefill_token == pytest.approx(0.0003)


@pytest.mark.parametrize(("fixed", "each"), [(0.2, 0.001), (0.015, 0.001)])
def test_an_owner_of_most_of_the_weight_keeps_all_of_its_rows(fixed: float, each: float) -> None:
    """Its own rows alone take longer than its part of the pace would allow: to hold them up would serve nobody."""
    cost = StepCost()
    for rows in range(1, 60):
        cost.observe(rows, fixed + each * rows)
    decoding = by_owner(sequences([10, 1], [10.0, 1.0]))
    assert all(who_decodes(decoding, cost, step) is None for step in range(20))


def test_weights_however_far_apart_leave_everybody_a_turn() -> None:
    cost = StepCost()
    for rows in range(1, 60):
        cost.observe(rows, 0.01 * rows)
    decoding = sequences([5, 9, 9], [1000.0, 1e-17, 1e-17])
    served = {s.request_id for step in range(20) for s in who_decodes(by_owner(decoding), cost, step) or decoding}
    assert len(served) == len(decoding)


def test_rows_of_other_priorities_take_no_turns() -> None:
    shared = SharedPace(cuts_prefills=True)
    for rows in range(1, 60):
        shared.cost.observe(rows, 0.01 * rows)
    queue = WaitingQueue(10)

    def plan(*priorities: int) -> Shares | None:
        running = [
            Sequence(request(f"{n}", owner=f"{n > 0}", priority=priority), n) for n, priority in enumerate(priorities)
        ]
        for sequence in running:
            sequence.num_computed = sequence.length - 1
        return shared.plan(running, queue.order, 1)

    assert plan(*[-10] * 20, 1000) is None
    shares = plan(*[-10] * 20)
    assert shares is not None
    assert shares.chosen is not None
