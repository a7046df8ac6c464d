"""What the engine tells of traced sequences, and that it tells nothing of others."""

from __future__ import annotations

from softbatch.scheduler.engine.moments import Moments
from softbatch.scheduler.protocol import AddRequest, Moment, SamplingParams, SequenceOutput, SoftPromptRef
from softbatch.scheduler.step import SoftPromptLoad, StepReport

SOFT_PROMPT = SoftPromptRef("ab", "/x", 4)


def asked(name: str, *, traced: bool = True, delivered: int = 0) -> AddRequest:
    return AddRequest(
        request_id=name,
        token_ids=[1, 2],
        params=SamplingParams(),
        soft_prompt=SOFT_PROMPT,
        num_delivered=delivered,
        traced=traced,
    )


def step(moments: Moments, **fields: list[object]) -> list[Moment]:
    outputs = fields.pop("outputs", [])
    report = StepReport(**fields)  # type: ignore[arg-type]
    moments.planned(report)
    report.outputs = outputs  # type: ignore[assignment]
    report.soft_prompt_loads = []
    return moments.of_step(report)


def kinds(found: list[Moment]) -> list[tuple[str, str]]:
    return [(moment.request_id, moment.kind) for moment in found]


def test_the_life_of_a_sequence() -> None:
    moments = Moments()
    moments.watch(asked("a"))
    moments.watch(asked("b", traced=False))
    load = SoftPromptLoad("ab", 1.0, 2.0)
    first = step(moments, soft_prompt_loads=[load], admitted=["a", "b"], outputs=[SequenceOutput("b", 3, [7])])
    assert kinds(first) == [("a", "loaded"), ("a", "admitted")]
    assert (first[0].since, first[0].at) == (1.0, 2.0)
    assert kinds(step(moments, outputs=[SequenceOutput("a", 6, [7])])) == [("a", "first_token")]
    assert kinds(step(moments, preempted=["a", "b"])) == [("a", "preempted")]
    last = step(moments, admitted=["a"], outputs=[SequenceOutput("a", 7, [8], finish_reason="length")])
    assert kinds(last) == [("a", "admitted"), ("a", "ended")]
    assert step(moments, outputs=[SequenceOutput("a", 7, [8])]) == []


def test_a_load_is_of_those_who_waited_for_it() -> None:
    moments = Moments()
    moments.watch(asked("early"))
    step(moments, admitted=["early"])
    moments.watch(asked("late"))
    assert kinds(step(moments, soft_prompt_loads=[SoftPromptLoad("cd", 1.0, 2.0)])) == []
    assert kinds(step(moments, soft_prompt_loads=[SoftPromptLoad("ab", 1.0, 2.0)])) == [("late", "loaded")]


def test_who_goes_on_after_an_engines_death_has_had_a_first_token() -> None:
    moments = Moments()
    moments.watch(asked("a", delivered=1))
    assert kinds(step(moments, admitted=["a"], outputs=[SequenceOutput("a", 6, [7])])) == [("a", "admitted")]


def test_who_is_cancelled_is_forgotten() -> None:
    moments = Moments()
    moments.watch(asked("a"))
    moments.forget("a")
    moments.forget("unknown")
    assert step(moments, admitted=["a"]) == []
