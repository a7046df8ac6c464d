"""Owners share equally, nobody starves, no slot stays empty, and with one owner nothing changes."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from softbatch.scheduler.fair_order import MAX_IDLE_LINES
from softbatch.scheduler.policy import precedence
from softbatch.scheduler.sequence import Sequence
from softbatch.scheduler.waiting_queue import WaitingQueue
from tests.support.fake_runner import FakeRunner, make_scheduler, request

NAMES = ("", "a", "b", "c")
WEIGHTS = st.sampled_from([0.1, 0.5, 1.0, 3.0, 20.0])


def admit(queue: WaitingQueue, generated: int = 0) -> Sequence:
    """As the scheduler does, and as if the output were there at once."""
    sequence = queue.peek()
    assert sequence is not None
    assert queue.pop() is sequence
    if not sequence.was_admitted:
        queue.order.charge(sequence, sequence.length)
    sequence.was_admitted = True
    queue.order.charge(sequence, generated)
    return sequence


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.randoms(use_true_random=False), st.sampled_from(["", "a"]))
def test_with_one_owner_the_order_is_that_of_precedence(random, owner):
    queue, waiting, running = WaitingQueue(1000), [], []
    for arrival in range(80):
        action = random.choice(["push", "push", "admit", "preempt", "cancel", "charge"])
        if action == "push":
            add = request(f"r{arrival}", priority=random.randint(-1, 1), owner=owner)
            waiting.append(Sequence(add, arrival, random.randint(0, 50)))
            queue.push(waiting[-1])
        elif action == "admit" and waiting:
            assert queue.peek() is min(waiting, key=precedence)
            running.append(admit(queue, random.randint(0, 9)))
            waiting.remove(running[-1])
        elif action == "preempt" and running:
            waiting.append(running.pop(random.randrange(len(running))))
            queue.push(waiting[-1], bounded=False)
        elif action == "cancel" and waiting:
            assert queue.remove(waiting.pop(random.randrange(len(waiting))).request_id)
        elif action == "charge" and running:
            queue.order.charge(random.choice(running), 7)
        assert queue.peek() is (min(waiting, key=precedence) if waiting else None)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.randoms(use_true_random=False))
def test_somebody_is_offered_whenever_somebody_waits_and_never_one_of_a_higher_priority_number(random):
    queue, waiting, parked, running = WaitingQueue(1000), [], [], []
    for arrival in range(120):
        action = random.choice(["push", "push", "admit", "preempt", "cancel", "park", "unpark"])
        if action == "push":
            add = request(f"r{arrival}", priority=random.randint(0, 1), owner=random.choice(NAMES))
            waiting.append(Sequence(add, arrival))
            queue.push(waiting[-1])
        elif action == "admit" and waiting:
            running.append(admit(queue, random.randint(0, 30)))
            waiting.remove(running[-1])
        elif action == "preempt" and running:
            waiting.append(running.pop(random.randrange(len(running))))
            queue.push(waiting[-1], bounded=False)
        elif action == "park" and waiting:
            parked.append(queue.peek())
            waiting.remove(parked[-1])
            queue.park("soft prompt")
        elif action == "unpark":
            assert set(queue.unpark("soft prompt")) == set(parked)
            waiting += parked
            parked = []
        elif action == "cancel" and (members := waiting + parked):
            gone = random.choice(members)
            assert queue.remove(gone.request_id) is gone
            (waiting if gone in waiting else parked).remove(gone)
        held = {s.owner for s in waiting + parked if s.priority == 0}
        assert queue.order.weight_beside(0, ["a", "gone"]) == len(held - {"a"})
        offered = queue.peek()
        assert (offered in waiting) if waiting else offered is None
        if offered is not None:
            assert offered.priority == min(sequence.priority for sequence in waiting)
    while waiting:
        waiting.remove(admit(queue))


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 40), WEIGHTS), min_size=2, max_size=4))
def test_owners_who_always_have_work_get_tokens_by_weight_whatever_the_size_of_their_requests(sizes):
    queue, had = WaitingQueue(1000), [0] * len(sizes)
    arrival = 0

    def ask(owner: int) -> None:
        nonlocal arrival
        arrival += 1
        length, _, weight = sizes[owner]
        asked = request(f"{owner}-{arrival}", length=length, owner=str(owner), weight=weight)
        queue.push(Sequence(asked, arrival))

    for owner in range(len(sizes)):
        for _ in range(3):
            ask(owner)
    for _ in range(400):
        owner = int(queue.peek().owner)
        admit(queue, sizes[owner][1])
        length, generated, weight = sizes[owner]
        had[owner] += (length + generated) / weight
        ask(owner)
        most = max((length + generated) / weight for length, generated, weight in sizes)
        assert max(had) - min(had) <= most + 1e-6


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.integers(1, 3), st.integers(1, 12), st.integers(1, 12), st.randoms(use_true_random=False))
def test_a_light_owner_waits_for_one_request_per_slot_of_a_heavy_one(slots, length, max_tokens, random):
    scheduler = make_scheduler(max_batch_size=slots, max_queue_size=1000, max_batch_tokens=40, num_blocks=64)
    runner, admitted = FakeRunner(scheduler), []

    def run_step() -> None:
        step = scheduler.schedule()
        admitted.extend(step.report.admitted)
        scheduler.postprocess(step, runner.run(step))
        scheduler.check_integrity()

    for index in range(100):
        assert scheduler.add(request(f"heavy{index}", length=8, max_tokens=8, owner="heavy")) is None
    for index in range(3):
        for _ in range(random.randint(0, 20)):
            run_step()
        before = len(admitted)
        scheduler.add(request(f"light{index}", length=length, max_tokens=max_tokens, owner="light"))
        while f"light{index}" not in admitted:
            run_step()
        assert admitted.index(f"light{index}") - before <= slots
        while any(sequence.owner == "light" for sequence in scheduler.running):
            run_step()


def test_nobody_saves_up_a_share_while_away_nor_starves_behind_newcomers():
    queue = WaitingQueue(10_000)
    for arrival in range(100):
        queue.push(Sequence(request(f"a{arrival}", owner="a"), arrival))
        assert admit(queue).owner == "a"
    for arrival in range(100, 140):
        for owner in "ab":
            queue.push(Sequence(request(f"{owner}{arrival}", owner=owner), arrival))
    assert sum(admit(queue).owner == "b" for _ in range(40)) in (19, 20, 21)
    served = []
    for arrival in range(200, 300):
        queue.push(Sequence(request(f"new{arrival}", owner=f"new{arrival}"), arrival))
        served.append(admit(queue).owner)
    assert {"a", "b"} <= set(served[:10])


@settings(max_examples=50, deadline=None, derandomize=True)
@given(WEIGHTS, WEIGHTS)
def test_nobody_starves_behind_newcomers_of_any_weight(own, others):
    queue, served = WaitingQueue(10_000), []
    queue.push(Sequence(request("a", owner="a", weight=own), 0))
    for arrival in range(1, 2000):
        queue.push(Sequence(request(f"new{arrival}", owner=f"new{arrival}", weight=others), arrival))
        served.append(admit(queue, 10).owner)
        if "a" in served:
            break
    assert "a" in served


def test_a_preempted_sequence_goes_before_all_other_owners():
    queue = WaitingQueue(100)
    for arrival in range(4):
        queue.push(Sequence(request(f"a{arrival}", owner="a"), arrival))
    first, _ = admit(queue), admit(queue)
    queue.push(Sequence(request("b", owner="b"), 10))
    queue.order.charge(first, 1000)
    queue.push(first, bounded=False)
    assert [admit(queue).request_id for _ in range(4)] == ["a0", "b", "a2", "a3"]


def test_any_number_of_owners_takes_a_bounded_room():
    queue = WaitingQueue(100)
    for arrival in range(5000):
        queue.push(Sequence(request(f"r{arrival}", owner=f"o{arrival}"), arrival))
        if arrival % 2:
            queue.remove(f"r{arrival}")
        else:
            admit(queue)
    order = queue.order
    assert len(order._idle) <= MAX_IDLE_LINES
    assert len(order._lines) == 0
    assert len(order) < 100
