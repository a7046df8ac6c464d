"""The policy's invariants: the queue and the preemptions follow one order, and nobody starves behind those who came
later."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from softbatch.scheduler.policy import OVERTAKING, insert, must_preempt, precedence, preemption_victim, turn
from softbatch.scheduler.sequence import Sequence
from softbatch.scheduler.waiting_queue import WaitingQueue
from tests.support.fake_runner import request

PRIORITIES = st.lists(st.integers(-3, 3), min_size=1, max_size=12)


def sequences(priorities: list[int]) -> list[Sequence]:
    """In order of arrival."""
    return [Sequence(request(f"r{n}", priority=priority), n) for n, priority in enumerate(priorities)]


def in_order(arrived: list[Sequence]) -> list[Sequence]:
    """By repeated search for the one that nobody precedes: a smaller priority number, or the same and earlier."""
    left, ordered = list(arrived), []
    while left:
        best = left[0]
        for other in left[1:]:
            if other.priority < best.priority or (other.priority == best.priority and other.arrival < best.arrival):
                best = other
        ordered.append(best)
        left.remove(best)
    return ordered


@settings(max_examples=100, deadline=None, derandomize=True)
@given(PRIORITIES, st.randoms(use_true_random=False))
def test_the_running_batch_is_in_order_however_it_came_about(priorities, random):
    arrived = sequences(priorities)
    running: list[Sequence] = []
    for sequence in random.sample(arrived, len(arrived)):
        insert(running, sequence)
    assert running == in_order(arrived)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(PRIORITIES, st.randoms(use_true_random=False))
def test_preemption_takes_the_last_in_order_and_the_first_is_left(priorities, random):
    arrived = sequences(priorities)
    left = random.sample(arrived, len(arrived))
    preempted = []
    while len(left) > 1:
        preempted.append(preemption_victim(left))
        left.remove(preempted[-1])
    assert left + preempted[::-1] == in_order(arrived)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(PRIORITIES, st.randoms(use_true_random=False))
def test_who_waits_is_offered_in_order_through_parking_preemption_and_cancellation(priorities, random):
    arrived = sequences(priorities)
    queue, outside, parked, cancelled = WaitingQueue(100), list(arrived), {}, []
    for _ in range(60):
        action = random.choice(["push", "pop", "park", "unpark", "cancel"])
        head = queue.peek()
        offered = [s for s in arrived if s not in outside and s not in cancelled and s not in parked]
        assert head is (in_order(offered)[0] if offered else None)
        if action == "push" and outside:
            queue.push(outside.pop(random.randrange(len(outside))))
        elif action == "pop" and head is not None:
            assert queue.pop() is head
            outside.append(head)  # it runs; when it is preempted it is pushed again
        elif action == "park" and head is not None:
            parked[head] = random.choice("ab")
            queue.park(parked[head])
        elif action == "unpark":
            key = random.choice("ab")
            back = [s for s in parked if parked[s] == key]
            assert sorted(queue.unpark(key), key=precedence) == in_order(back)
            for sequence in back:
                del parked[sequence]
        elif action == "cancel" and (waiting := list(queue)):
            sequence = random.choice(waiting)
            assert queue.remove(sequence.request_id) is sequence
            parked.pop(sequence, None)
            cancelled.append(sequence)
        assert len(queue) == len(arrived) - len(outside) - len(cancelled)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(PRIORITIES, st.data())
def test_nobody_is_preempted_while_blocks_are_about_to_come_free(priorities, data):
    running = sequences(priorities)
    for sequence in running:
        sequence.tokens += [1] * data.draw(st.integers(0, 8))
        sequence.num_in_flight_tokens = data.draw(st.integers(0, 1)) if sequence.num_generated < 8 else 0
    about_to_end = [s for s in running if s.num_in_flight_tokens and s.num_generated == 7]
    assert must_preempt(running) == (not about_to_end)


LENGTHS = st.lists(st.integers(1, 5000), min_size=1, max_size=40)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(LENGTHS)
def test_no_prompt_is_overtaken_by_more_than_its_share(lengths):
    """Prompts arrive one by one, each begun before the next comes: what goes before the first of them is bounded."""
    first = Sequence(request("first"), 0, turn(0, lengths[0]))
    passed = begun = 0
    for arrival, length in enumerate(lengths * 100, 1):
        if precedence(Sequence(request("later"), arrival, turn(begun, length))) > precedence(first):
            break
        begun += length
        passed = begun
    assert passed <= OVERTAKING * 2 * lengths[0] + 5000


@settings(max_examples=100, deadline=None, derandomize=True)
@given(LENGTHS)
def test_prompts_of_one_length_stay_in_the_order_of_arrival(lengths):
    begun, before = 0, None
    for arrival, length in enumerate(lengths):
        found = precedence(Sequence(request("next"), arrival, turn(begun, 1900)))
        assert before is None or before < found
        before, begun = found, begun + length
