"""Invariants of blocks, slots and soft prompts under random traffic, without a model."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from softbatch.scheduler.block_pool import BlockPool, OutOfBlocks
from softbatch.scheduler.length_rule import LengthRule
from softbatch.scheduler.protocol import BACKGROUND, AddRequest, SequenceOutput
from softbatch.scheduler.scheduler import Scheduler
from softbatch.scheduler.soft_prompt_cache import LoadState
from softbatch.scheduler.step import Step, StepResult
from softbatch.scheduler.step_pace import LEAST, STRETCH, StepPace
from tests.support.fake_runner import EOS, FakeRunner, make_scheduler, next_token, prompt_ref, request


def expected_output(req: AddRequest) -> list[int]:
    tokens, out = list(req.token_ids), []
    while len(out) < req.params.max_tokens:
        out.append(next_token(tokens))
        tokens.append(out[-1])
        if out[-1] == EOS and not req.params.ignore_eos:
            break
    return out


def drive(
    scheduler: Scheduler, runner: FakeRunner, received: dict[str, list[int]]
) -> tuple[Step, list[SequenceOutput]]:
    step = scheduler.schedule()
    assert step.num_tokens <= scheduler.config.max_batch_tokens
    runner.read(step, "kv")
    scheduler.check_integrity()
    outputs = scheduler.postprocess(step, runner.run(step))
    scheduler.check_integrity()
    for output in outputs:
        received.setdefault(output.request_id, []).extend(output.token_ids)
    for sha256 in list(runner.kinds):
        runner.finish_read(sha256)
    return step, outputs


@settings(max_examples=250, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32),
    num_blocks=st.integers(20, 60),
    block_size=st.sampled_from([1, 3, 4, 16]),
    slots=st.integers(1, 6),
    extra_budget=st.integers(0, 20),
    async_scheduling=st.sampled_from(["off", "on", "resampled"]),
    fail=st.sampled_from([0.0, 0.02, 0.2]),
    length_rule=st.sampled_from([None, None, LengthRule(11), LengthRule(11, renews=True)]),
)
def test_random_traffic_keeps_every_invariant(
    seed, num_blocks, block_size, slots, extra_budget, async_scheduling, fail, length_rule
):
    """With async scheduling, each step is scheduled and launched before the result of the one before is processed."""
    rng = random.Random(seed)
    capacity = num_blocks * block_size
    scheduler = make_scheduler(
        num_blocks=num_blocks,
        block_size=block_size,
        max_batch_size=slots,
        max_batch_tokens=slots + extra_budget,
        max_model_len=min(40, capacity),
        length_rule=length_rule,
    )
    runner = FakeRunner(scheduler, resample=0.2 if async_scheduling == "resampled" else 0.0, fail=fail)
    in_flight: list[tuple[Step, StepResult]] = []
    prompts = [prompt_ref(f"p{i}", rng.choice([1, 2, block_size, block_size + 1, 7])) for i in range(4)]
    waiting, added, cancelled, received = list(range(30)), {}, set(), {}
    refused, failed = set(), set()
    for _ in range(5000):
        if waiting and rng.random() < 0.5:
            name = f"r{waiting.pop()}"
            # Few distinct tokens, so that prefixes coincide and blocks are shared.
            tokens = [rng.choice([5, 6]) for _ in range(rng.randint(1, 24))]
            req = request(
                name,
                tokens=tokens,
                max_tokens=rng.randint(1, 15),
                soft_prompt=rng.choice([None, *prompts]),
                priority=rng.choice([0, 0, 1, BACKGROUND]),
                ignore_eos=rng.random() < 0.5,
            )
            added[name] = req
            if scheduler.add(req) is not None:
                refused.add(name)
        if added and rng.random() < 0.05:
            name = rng.choice(list(added))
            if scheduler.cancel(name):
                cancelled.add(name)
        if rng.random() < 0.05:
            scheduler.soft_prompts.evict_when_unused(rng.choice(prompts).sha256)
        step = scheduler.schedule()
        assert step.num_tokens <= scheduler.config.max_batch_tokens
        runner.read(step, rng.choice(["kv", "embeddings"]))
        if rng.random() < 0.3:
            for sha256 in list(runner.kinds):  # prefetched: sequences that wait for it are admitted late
                runner.finish_read(sha256)
            step.soft_prompts_to_load.clear()
            scheduler.admit_late(step)
            assert step.num_tokens <= scheduler.config.max_batch_tokens
            runner.read(step, rng.choice(["kv", "embeddings"]))
        scheduler.check_integrity()
        in_flight.append((step, runner.run(step)))
        scheduler.check_integrity()
        while len(in_flight) > (async_scheduling != "off" and bool(step)):
            for output in scheduler.postprocess(*in_flight.pop(0)):
                assert output.request_id not in cancelled
                received.setdefault(output.request_id, []).extend(output.token_ids)
                if output.error is not None:
                    failed.add(output.request_id)
            scheduler.check_integrity()
        for sha256 in list(runner.kinds):
            if rng.random() < 0.5:
                runner.finish_read(sha256)
        if not waiting and not scheduler.has_work and not in_flight:
            break
    assert not scheduler.has_work
    for name, req in added.items():
        if name not in cancelled | refused | failed:
            assert received[name] == expected_output(req), name
    uses = [name for name, req in added.items() if req.soft_prompt is not None and name not in refused]
    counted = scheduler.soft_prompts.hits + scheduler.soft_prompts.misses
    assert len(set(uses) - cancelled - failed) <= counted <= len(uses)
    assert len(scheduler.waiting) == 0
    assert scheduler.waiting.num_tokens == 0
    assert scheduler.pool.num_used == sum(len(p.blocks) for p in scheduler.soft_prompts.all())
    for prompt in prompts:
        scheduler.soft_prompts.evict_when_unused(prompt.sha256)
    assert scheduler.pool.num_used == 0


@settings(max_examples=100, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32), num_blocks=st.integers(1, 20))
def test_block_pool_against_a_plain_model(seed, num_blocks):
    rng = random.Random(seed)
    pool = BlockPool(num_blocks, 4)
    owners: list[list[int]] = []
    for _ in range(200):
        action = rng.random()
        if action < 0.4:
            count = rng.randint(0, num_blocks)
            free = pool.num_free
            if count > free:
                with pytest.raises(OutOfBlocks):
                    pool.allocate(count)
                assert pool.num_free == free
            else:
                owners.append(pool.allocate(count))
                assert len(set(owners[-1])) == count
        elif action < 0.6 and owners:
            pool.release(owners.pop(rng.randrange(len(owners))))
        elif action < 0.8 and owners:
            for block in rng.choice(owners):
                pool.register(block, bytes([rng.randrange(30)]))
        else:
            found = pool.match([bytes([rng.randrange(30)]) for _ in range(3)])
            pool.share(found)
            owners.append(found)
        pool.check_integrity(owners)


def test_fifth_waits_and_is_admitted_in_the_step_after_the_first_of_four_ends():
    scheduler = make_scheduler()
    runner, received = FakeRunner(scheduler), {}
    for index, max_tokens in enumerate([20, 6, 20, 20]):
        scheduler.add(request(f"r{index}", length=2, max_tokens=max_tokens))
    drive(scheduler, runner, received)
    scheduler.add(request("fifth", length=2))
    while True:
        step, outputs = drive(scheduler, runner, received)
        assert step.report.admitted == []
        assert [s.request_id for s in scheduler.waiting] == ["fifth"]
        if any(o.finish_reason for o in outputs):
            break
    assert [s.request_id for s in scheduler.running] == ["r0", "r2", "r3"]
    step, _ = drive(scheduler, runner, received)
    assert step.report.admitted == ["fifth"]
    assert len(step.rows) == 4
    assert len(scheduler.waiting) == 0


def test_a_long_prefill_never_halts_decoding():
    scheduler = make_scheduler(max_batch_tokens=8)
    runner, received = FakeRunner(scheduler), {}
    scheduler.add(request("decoding", length=2, max_tokens=30))
    drive(scheduler, runner, received)
    scheduler.add(request("long", length=50, max_tokens=2, priority=-1))
    steps = 0
    while "long" not in received or not received["long"]:
        before = len(received["decoding"])
        step, _ = drive(scheduler, runner, received)
        assert len(received["decoding"]) == before + 1
        assert step.num_tokens <= 8
        steps += 1
    assert steps == 8  # 50 tokens in chunks of 7, beside one decoding token each


def test_a_short_prompt_has_its_first_token_within_two_steps_whatever_is_being_computed():
    """Long prompts wait and are being computed: it goes before both, and the step's other tokens are still theirs."""
    scheduler = make_scheduler(max_batch_tokens=8, max_batch_size=6, max_model_len=256, num_blocks=400)
    runner, received = FakeRunner(scheduler), {}
    for index in range(4):
        scheduler.add(request(f"long{index}", length=200, max_tokens=2))
    for _ in range(3):
        drive(scheduler, runner, received)
    scheduler.add(request("short", length=3, max_tokens=4))
    step, outputs = drive(scheduler, runner, received)
    assert "short" in [o.request_id for o in outputs if o.token_ids]
    assert step.num_tokens == 8
    while scheduler.has_work:
        drive(scheduler, runner, received)
    assert len(received) == 5


def test_a_long_prompt_is_computed_beside_any_number_of_short_ones():
    scheduler = make_scheduler(max_batch_tokens=8, max_batch_size=6, max_model_len=256, num_blocks=400)
    runner, received = FakeRunner(scheduler), {}
    scheduler.add(request("long", length=60, max_tokens=2))
    for steps in range(2000):
        for index in range(3):  # more than a step can take
            scheduler.waiting.remove(f"short{steps - 1}.{index}")
            scheduler.add(request(f"short{steps}.{index}", length=4, max_tokens=1))
        drive(scheduler, runner, received)
        if received.get("long"):
            break
    assert received.get("long")


def test_a_slow_machine_cuts_prefills_smaller_and_no_prompt_takes_longer_steps_than_wanted():
    """Whatever a token costs, once the sizes have settled."""
    for seconds_per_token in (0.00001, 0.0003, 0.001, 0.1):
        scheduler = make_scheduler(max_batch_tokens=1024, max_model_len=4096, num_blocks=2000, step_target=0.05)
        runner, received, sizes = FakeRunner(scheduler), {}, []
        for index in range(3):
            scheduler.add(request(f"long{index}", tokens=[index + 1] * 2000, max_tokens=2))
            while scheduler.has_work:
                step, _ = drive(scheduler, runner, received)
                scheduler.observe(step, step.num_tokens * seconds_per_token)
                sizes.append(step.num_tokens)
        wanted = min(1024, max(0.05 / seconds_per_token, LEAST))
        assert 0.4 * wanted <= sorted(sizes)[len(sizes) // 2] <= wanted
        assert sum(sizes) == 3 * 2001


def test_steps_are_longer_while_long_prompts_wait_but_not_that_of_a_short_one():
    scheduler = make_scheduler(
        max_batch_tokens=2048, max_batch_size=8, max_model_len=4096, num_blocks=3000, step_target=0.05
    )
    runner, received, alone, behind = FakeRunner(scheduler), {}, [], []

    def step(sizes: list[int]) -> Step:
        made, _ = drive(scheduler, runner, received)
        scheduler.observe(made, made.num_tokens * 0.0005)
        sizes.append(made.num_tokens)
        return made

    scheduler.add(request("first", tokens=[1] * 800, max_tokens=1))
    while scheduler.has_work:
        step(alone)
    for index in range(8):
        scheduler.add(request(f"long{index}", tokens=[index + 2] * 800, max_tokens=4))
    for _ in range(4):
        step(behind)
    assert max(alone[3:]) <= 100
    assert 3 * max(alone[3:]) <= max(behind) <= STRETCH * 100
    scheduler.cancel("long7")
    scheduler.add(request("short", tokens=[50] * 30, max_tokens=1))
    made = step([])
    assert received["short"], "its first token comes with the next step"
    assert made.num_tokens <= 100
    assert step([]).num_tokens > 3 * max(alone[3:]), "and then steps are long again"
    while scheduler.has_work:
        step([])
    assert len(received) == 9


@pytest.mark.parametrize("stands", ["in the prefix cache", "in a soft prompt"])
def test_a_question_behind_what_is_computed_is_a_short_one(stands: str) -> None:
    scheduler = make_scheduler(
        max_batch_tokens=2048, max_batch_size=10, max_model_len=4096, num_blocks=3000, step_target=0.05
    )
    runner, received = FakeRunner(scheduler), {}

    def step() -> Step:
        made, _ = drive(scheduler, runner, received)
        scheduler.observe(made, made.num_tokens * 0.0005)
        return made

    context = [60] * 1600
    behind = {"soft_prompt": prompt_ref("a", 1600)} if stands == "in a soft prompt" else {}
    asked = [61] * 30 if behind else [*context, *[61] * 30]
    scheduler.add(request("before", tokens=asked[:-1], max_tokens=1, **behind))
    while scheduler.has_work:
        step()
    for index in range(8):
        scheduler.add(request(f"long{index}", tokens=[index + 2] * 800, max_tokens=4))
    for _ in range(4):
        step()
    scheduler.add(request("asked", tokens=asked, max_tokens=1, priority=-1, **behind))
    made = step()
    assert received["asked"], "its first token comes with the next step"
    assert made.num_tokens <= 100, "which is no longer than others"


def test_slow_steps_now_and_then_leave_the_size_as_it_is():
    pace = StepPace(0.05, 1024)
    for number in range(200):
        tokens = pace.for_prefills(0)
        pace.observe(tokens, tokens * 0.0003 * (3 if number % 12 == 5 else 1))
        assert number < 20 or 0.6 * 0.05 <= tokens * 0.0003 <= 0.05


def test_prefills_go_on_beside_however_many_that_decode():
    pace = StepPace(0.05, 1024)
    for _ in range(20):
        pace.observe(1024, 9.0)
    assert [pace.for_prefills(decodes) for decodes in (0, 8, 64, 1020)] == [LEAST, LEAST, 4 * 64, 4]
    assert pace.for_prefills(0, behind=9000) == LEAST, "steps that are too long already are not stretched"
    assert StepPace(None, 1024).for_prefills(24) == StepPace(None, 1024).for_prefills(24, behind=9000) == 1000


def test_a_step_is_stretched_as_far_as_prompts_wait_and_no_further_than_a_step_may_be():
    pace = StepPace(0.05, 512)
    pace.observe(512, 0.25)
    limit = pace.for_prefills(0)
    assert 64 <= limit <= 128
    assert [pace.for_prefills(0, behind=tokens) for tokens in (0, 5 * limit, 16 * limit)] == [limit, limit, 2 * limit]
    assert pace.for_prefills(8, behind=10**6) == min(512, STRETCH * limit) - 8
    assert pace.for_prefills(8, 40, behind=10**6) == 40, "others' pace is kept"
    assert pace.for_prefills(0, background=True, behind=10**6) == LEAST


def test_preemption_takes_the_newest_of_the_lowest_priority_and_loses_nothing():
    scheduler = make_scheduler(num_blocks=8, block_size=4, max_model_len=32)
    runner, received = FakeRunner(scheduler), {}
    requests = [
        request("old", length=4, max_tokens=20),
        request("unimportant", length=4, max_tokens=20, priority=5),
        request("new", length=4, max_tokens=20),
    ]
    for req in requests:
        assert scheduler.add(req) is None
    preempted = []
    while scheduler.has_work:
        step, _ = drive(scheduler, runner, received)
        preempted += step.report.preempted
    assert preempted[0] == "unimportant"
    assert "old" not in preempted
    for req in requests:
        assert received[req.request_id] == expected_output(req)


def test_prefixes_are_shared_by_soft_prompt_salt_and_tokens_only():
    scheduler = make_scheduler(max_batch_tokens=64)
    runner, received = FakeRunner(scheduler), {}
    first, second = prompt_ref("first", 6), prompt_ref("second", 6)
    tokens = [5] * 20

    def computed(name: str, **kwargs: object) -> int:
        scheduler.add(request(name, tokens=tokens, max_tokens=1, **kwargs))
        total = 0
        while scheduler.has_work:
            step, _ = drive(scheduler, runner, received)
            total += step.num_tokens
        return total

    assert computed("a") == 20
    assert computed("b") == 4  # four of five blocks; the last token's logits are needed
    assert computed("c", cache_salt="other") == 20
    assert computed("d", soft_prompt=first) == 20
    assert computed("e", soft_prompt=first) == 2  # 26 positions: six blocks, the first full one being virtual
    assert computed("f", soft_prompt=second) == 20


def test_a_soft_prompt_is_shared_pinned_evicted_and_reloaded():
    scheduler = make_scheduler(num_blocks=11, block_size=4, max_model_len=40)
    runner, received = FakeRunner(scheduler), {}
    first, second = prompt_ref("first", 18), prompt_ref("second", 26)
    scheduler.add(request("a", length=2, max_tokens=3, soft_prompt=first))
    scheduler.add(request("b", length=2, max_tokens=3, soft_prompt=first))
    step, _ = drive(scheduler, runner, received)
    assert [ref.sha256 for ref in step.soft_prompts_to_load] == ["first"]
    drive(scheduler, runner, received)
    shared = [s.block_table[:4] for s in scheduler.running]
    assert shared[0] == shared[1]
    assert scheduler.running[0].block_table[4] != scheduler.running[1].block_table[4]
    scheduler.add(request("c", length=2, max_tokens=3, soft_prompt=second))
    while scheduler.has_work:
        pinned = any(s.soft_prompt is first for s in scheduler.running)
        drive(scheduler, runner, received)
        if pinned:
            assert scheduler.soft_prompts.get("first") is not None
    assert scheduler.soft_prompts.evictions == 1
    assert scheduler.soft_prompts.get("first") is None
    assert (scheduler.soft_prompts.hits, scheduler.soft_prompts.misses) == (0, 3)


def test_others_run_on_while_a_soft_prompt_loads():
    scheduler = make_scheduler()
    runner = FakeRunner(scheduler)
    scheduler.add(request("needs", length=2, soft_prompt=prompt_ref("slow", 6)))
    scheduler.add(request("plain", length=2, max_tokens=4))
    for _ in range(4):
        step = scheduler.schedule()
        runner.read(step, "embeddings")
        scheduler.postprocess(step, runner.run(step))
    assert scheduler.soft_prompts.get("slow").state is LoadState.READING
    assert [s.request_id for s in scheduler.waiting] == ["needs"]
    assert not scheduler.running
    failed = scheduler.soft_prompt_loads.fail("slow", "unreadable")
    assert [(f.request_id, f.error) for f in failed] == [("needs", "unreadable")]
    assert scheduler.pool.num_used == 0
    assert not scheduler.has_work


def test_what_can_never_fit_is_refused_at_once():
    scheduler = make_scheduler(num_blocks=8, block_size=4, max_model_len=64)
    assert "64" in scheduler.add(request("long", length=60, max_tokens=5)).error
    assert "KV cache" in scheduler.add(request("large", length=30, max_tokens=5)).error
    assert scheduler.add(request("fits", length=24, max_tokens=8)) is None


def test_one_failing_row_leaves_alone():
    scheduler = make_scheduler()
    runner = FakeRunner(scheduler)
    scheduler.add(request("good", length=2))
    scheduler.add(request("bad", length=2))
    step = scheduler.schedule()
    result = runner.run(step)
    outputs = scheduler.postprocess(
        step, StepResult(tokens=result.tokens, logprobs={}, scores={}, errors={"bad": "broken"}, prefill_errors={})
    )
    assert {o.request_id: o.finish_reason for o in outputs} == {"good": None, "bad": "error"}
    assert [s.request_id for s in scheduler.running] == ["good"]
    scheduler.check_integrity()


def test_a_request_with_a_soft_prompt_is_not_starved_by_a_stream_of_plain_ones():
    scheduler = make_scheduler(max_batch_size=1, num_blocks=8, block_size=4, max_model_len=24)
    runner, received = FakeRunner(scheduler), {}
    scheduler.add(request("plain0", length=4, max_tokens=16))
    drive(scheduler, runner, received)
    scheduler.add(request("soft", length=2, max_tokens=2, soft_prompt=prompt_ref("p", 12)))
    for index in range(1, 200):
        if len(scheduler.waiting) < 5:
            scheduler.add(request(f"plain{index}", length=4, max_tokens=16))
        drive(scheduler, runner, received)
        if len(received.get("soft", [])) == 2:
            break
    assert len(received["soft"]) == 2
    assert index < 60


def test_loading_a_soft_prompt_preempts_nobody():
    scheduler = make_scheduler(num_blocks=8, block_size=4, max_model_len=28)
    runner, received = FakeRunner(scheduler), {}
    scheduler.add(request("old", length=6, max_tokens=10))
    drive(scheduler, runner, received)
    scheduler.add(request("new", length=2, max_tokens=1, soft_prompt=prompt_ref("p", 22)))
    while "old" in {s.request_id for s in scheduler.running}:
        step, _ = drive(scheduler, runner, received)
        assert not step.report.preempted


def test_no_more_soft_prompts_are_loaded_than_slots_are_free():
    scheduler = make_scheduler(max_batch_size=2)
    for index in range(10):
        scheduler.add(request(f"r{index}", soft_prompt=prompt_ref(f"p{index}", 5)))
    assert len(scheduler.schedule().soft_prompts_to_load) == 2
    assert scheduler.schedule().soft_prompts_to_load == []


def test_computing_a_soft_prompt_leaves_room_for_others():
    scheduler = make_scheduler(max_batch_tokens=8, num_blocks=100, max_model_len=300)
    scheduler.add(request("soft", length=2, soft_prompt=prompt_ref("p", 200)))
    scheduler.schedule()
    scheduler.soft_prompt_loads.start_prefill("p")
    scheduler.add(request("plain", length=3))
    step = scheduler.schedule()
    assert [(row.sequence.request_id, row.num_tokens) for row in step.rows] == [("plain", 3)]
    assert [prefill.num_tokens for prefill in step.prefills] == [4]


def test_cancelled_requests_do_not_pile_up_behind_a_blocked_head():
    scheduler = make_scheduler(max_batch_size=1, max_queue_size=10)
    scheduler.add(request("running", max_tokens=50))
    scheduler.schedule()
    scheduler.add(request("head"))
    for index in range(1000):
        scheduler.add(request(f"r{index}", priority=9))
        scheduler.cancel(f"r{index}")
    assert [s.request_id for s in scheduler.waiting] == ["head"]
    assert len(scheduler.waiting.order) < 40


def test_a_deleted_soft_prompt_is_evicted_with_its_last_user():
    scheduler = make_scheduler()
    runner, received = FakeRunner(scheduler), {}
    scheduler.add(request("user", length=2, max_tokens=4, soft_prompt=prompt_ref("p", 6)))
    drive(scheduler, runner, received)
    drive(scheduler, runner, received)
    scheduler.soft_prompts.evict_when_unused("p")
    while scheduler.has_work:
        drive(scheduler, runner, received)
    assert len(received["user"]) == 4
    assert scheduler.pool.num_used == 0


def test_nobody_is_preempted_for_blocks_that_come_back_after_this_step():
    """The short one's last token is in flight when the long one needs another block."""
    scheduler = make_scheduler(num_blocks=4, block_size=4, max_model_len=16)
    runner = FakeRunner(scheduler)
    asked = [request("long", length=7, max_tokens=8, priority=-1), request("short", length=4, max_tokens=2)]
    for req in asked:
        scheduler.add(req)
    received: dict[str, list[int]] = {}
    sizes, before = [], None
    while scheduler.has_work:
        step = scheduler.schedule()
        assert not step.report.preempted
        sizes.append(len(step.rows))
        after = (step, runner.run(step)) if step else None
        for output in scheduler.postprocess(*before) if before else []:
            received.setdefault(output.request_id, []).extend(output.token_ids)
        before = after
    assert sizes[:4] == [2, 2, 0, 1]
    assert received == {req.request_id: expected_output(req) for req in asked}


def test_a_step_scores_no_more_positions_than_their_logits_have_room() -> None:
    """What needs no logits is not held up by that."""
    scheduler = make_scheduler(max_scored_tokens=3)
    for name, score_from in (("a", 1), ("b", 1), ("late", 6)):
        assert scheduler.add(request(name, length=8, max_tokens=0, score_from=score_from)) is None
    scored, counts = [], {"a": 0, "b": 0, "late": 0}
    while scheduler.has_work:
        step = scheduler.schedule()
        scored.append(step.num_scored)
        for row in step.rows:
            counts[row.sequence.request_id] += row.num_tokens
        if len(scored) == 1:
            assert counts == {"a": 3, "b": 0, "late": 5}
        scheduler.mark_in_flight(step)
        scheduler.postprocess(step, StepResult({}, {}, {}, {}, {}))
        scheduler.check_integrity()
    assert (max(scored), sum(scored)) == (3, 7 + 7 + 2)
    assert counts == dict.fromkeys(counts, 8)
