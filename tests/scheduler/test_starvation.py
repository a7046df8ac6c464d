"""Under a load that never ends, and with too few blocks for it, everybody is served."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.fake_runner import FakeRunner, make_scheduler, request

MOST_STEPS = 3000


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.randoms(use_true_random=False), st.integers(1, 30), st.integers(1, 12), st.sampled_from(["", "own"]))
def test_whoever_arrives_ends_and_who_is_preempted_keeps_its_place(random, length, max_tokens, owner):
    scheduler = make_scheduler(num_blocks=20, max_batch_size=5)
    runner, arrived = FakeRunner(scheduler), 0
    lengths: dict[str, int] = {}
    waiting_again: dict[str, int] = {}  # who was preempted, and how many had arrived by then
    ended: set[str] = set()
    preempted = False

    def ask(name: str, length: int, max_tokens: int, owner: str) -> None:
        nonlocal arrived
        arrived += 1
        name = f"{name}/{owner}/{arrived}"
        lengths[name] = length
        asked = request(name, tokens=[arrived % 50 + 1] * length, max_tokens=max_tokens, owner=owner)
        assert scheduler.add(asked) is None

    for _ in range(8):
        ask("other", 20, 20, "heavy")
    ask("awaited", length, max_tokens, owner)
    awaited = f"awaited/{owner}/{arrived}"
    for _ in range(MOST_STEPS):
        while len(scheduler.waiting) < 12:
            ask("other", random.choice((1, 20, 40)), random.randint(1, 20), random.choice(("", "own", "heavy")))
        step = scheduler.schedule()
        for name in step.report.admitted:
            check_place(name, lengths, waiting_again)
        for name in step.report.preempted:
            waiting_again[name] = arrived
        outputs = scheduler.postprocess(step, runner.run(step))
        scheduler.check_integrity()
        ended |= {output.request_id for output in outputs if output.finish_reason}
        preempted |= bool(waiting_again)
        if awaited in ended and preempted:
            break
    assert awaited in ended
    assert preempted


def check_place(name: str, lengths: dict[str, int], waiting_again: dict[str, int]) -> None:
    """Nobody of the same owner who came after a preemption is admitted before the preempted one; shorter prompts may
    be, for a while."""
    waiting_again.pop(name, None)
    _, owner, number = name.split("/")
    for other, arrived in waiting_again.items():
        if other.split("/")[1] == owner and int(number) > arrived:
            assert lengths[name].bit_length() < lengths[other].bit_length(), (name, other)
