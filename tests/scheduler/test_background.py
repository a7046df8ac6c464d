"""What runs in the background takes nothing from those who wait for an answer, and loses nothing."""

from __future__ import annotations

from typing import Any

from softbatch.scheduler.protocol import BACKGROUND, AddRequest
from softbatch.scheduler.scheduler import Scheduler
from softbatch.scheduler.step import Step
from tests.support.fake_runner import FakeRunner, make_scheduler, next_token, prompt_ref, request


def behind(name: str, **fields: Any) -> AddRequest:
    return request(name, priority=BACKGROUND, **fields)


def steps_until_first_token(scheduler: Scheduler, runner: FakeRunner, name: str) -> list[Step]:
    steps: list[Step] = []
    while len(steps) < 100:
        steps.append(scheduler.schedule())
        outputs = scheduler.postprocess(steps[-1], runner.run(steps[-1]))
        scheduler.check_integrity()
        if any(output.request_id == name and output.token_ids for output in outputs):
            return steps
    raise AssertionError(f"{name} has no token")


def rows(step: Step) -> dict[str, int]:
    return {row.sequence.request_id: row.num_tokens for row in step.rows}


def test_a_prefill_has_its_steps_to_itself() -> None:
    scheduler = make_scheduler()
    runner = FakeRunner(scheduler)
    for name in ("one", "two"):
        scheduler.add(behind(name, length=4, max_tokens=40))
    steps_until_first_token(scheduler, runner, "two")
    scheduler.add(request("awaited", tokens=list(range(50, 70)), max_tokens=3))
    assert [rows(step) for step in steps_until_first_token(scheduler, runner, "awaited")] == [
        {"awaited": 16},
        {"awaited": 4},
    ]
    assert rows(scheduler.schedule()) == {"awaited": 1, "one": 1, "two": 1}


def test_slots_and_blocks_are_given_up_at_once_and_nothing_is_lost() -> None:
    for options in ({"max_batch_size": 2}, {"num_blocks": 12, "max_batch_size": 4}):
        scheduler = make_scheduler(max_model_len=44, **options)
        runner = FakeRunner(scheduler)
        asked = [behind("one", length=16, max_tokens=20), behind("two", tokens=[7] * 16, max_tokens=20)]
        for each in asked:
            scheduler.add(each)
        steps_until_first_token(scheduler, runner, "two")
        asked.append(request("awaited", tokens=list(range(50, 65)), max_tokens=3))
        scheduler.add(asked[-1])
        received: dict[str, list[int]] = {}
        step = scheduler.schedule()
        assert rows(step) == {"awaited": 15}, options
        assert step.report.preempted == ["two"], options
        while scheduler.has_work:
            for output in scheduler.postprocess(step, runner.run(step)):
                received.setdefault(output.request_id, []).extend(output.token_ids)
            step = scheduler.schedule()
        assert {name: tokens[-3:] for name, tokens in received.items()} == {
            each.request_id: continuation(each)[-3:] for each in asked
        }


def continuation(asked: AddRequest) -> list[int]:
    tokens = list(asked.token_ids)
    while len(tokens) < len(asked.token_ids) + asked.params.max_tokens:
        tokens.append(next_token(tokens))
    return tokens[len(asked.token_ids) :]


def test_prefills_are_cut_short_while_others_may_come() -> None:
    scheduler = make_scheduler(max_batch_tokens=512, max_model_len=600, num_blocks=600, step_target=10.0)
    scheduler.pace._limit = 512
    runner = FakeRunner(scheduler)
    scheduler.add(behind("alone", length=200, max_tokens=1))
    assert rows(scheduler.schedule()) == {"alone": 200}
    scheduler = make_scheduler(max_batch_tokens=512, max_model_len=600, num_blocks=600, step_target=10.0)
    scheduler.pace._limit = 512
    runner = FakeRunner(scheduler)
    scheduler.add(request("awaited", length=4, max_tokens=1))
    steps_until_first_token(scheduler, runner, "awaited")
    scheduler.add(behind("beside", length=200, max_tokens=1))
    assert rows(scheduler.schedule()) == {"beside": 32}


def test_a_soft_prompt_that_finds_no_blocks_gets_them() -> None:
    scheduler = make_scheduler(num_blocks=12, max_batch_size=4, max_model_len=44)
    runner = FakeRunner(scheduler)
    for number, name in enumerate(("one", "two")):
        scheduler.add(behind(name, tokens=[number + 1] * 16, max_tokens=24))
    steps_until_first_token(scheduler, runner, "two")
    scheduler.add(request("awaited", length=4, max_tokens=3, soft_prompt=prompt_ref("manual", 16)))
    step = scheduler.schedule()
    assert [ref.num_virtual_tokens for ref in step.soft_prompts_to_load] == [16]
    assert step.report.preempted == ["two"]
