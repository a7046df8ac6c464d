"""A run's plan: it holds from the first answers to the report, and a run that began without one goes on without one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from softbatch.prompt_store.compression.forecast import load_forecast
from softbatch.prompt_store.compression.frozen.pairs import TrainingPair
from softbatch.prompt_store.compression.pace import Stopped
from softbatch.prompt_store.compression.progress import Progress
from tests.prompt_store.compression.test_pipeline import compression
from tests.support.models import Reference

BUDGET: dict[str, Any] = {"steps": None, "minutes": 1.0, "questions": 200}


def ticking(seconds: float = 0.4) -> Callable[[], float]:
    """A clock of which every look costs so many seconds."""
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += seconds
        return now

    return clock


def stopped_in(phase: str) -> dict[str, Any]:
    """Options of a run that is stopped once it tells of that phase."""
    told: list[str] = []

    def on_progress(progress: Progress) -> None:
        told.append(progress.phase)

    return {"on_progress": on_progress, "should_stop": lambda: phase in told}


def test_a_run_without_a_forecast_goes_on_without_one(
    llama: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    older = compression(llama, tmp_path, clock=ticking(), **BUDGET, **stopped_in("training"))
    monkeypatch.setattr(older, "_forecast", lambda *_: None)
    with pytest.raises(Stopped):
        older.run()
    (tmp_path / "forecast.json").write_text("{")
    report = compression(llama, tmp_path, clock=ticking(), **BUDGET).run(resume=True).report
    assert report["forecast"] is None
    assert report["evaluation"]["questions"] == 6


@pytest.mark.parametrize(("opening", "is_warned"), [(40.0, True), (20.0, False)])
def test_a_long_opening_is_said_before_the_work(
    llama: Reference, tmp_path: Path, opening: float, is_warned: bool
) -> None:
    told: list[Progress] = []
    run = compression(llama, tmp_path, **BUDGET, opening=opening, on_progress=told.append, should_stop=lambda: True)
    with pytest.raises(Stopped):
        run.run()
    assert told[0].phase == "self_study"
    assert (told[0].note is not None and "opening the model alone took 40 s" in told[0].note) is is_warned


def test_a_resumed_run_keeps_its_forecast(llama: Reference, tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        compression(llama, tmp_path, clock=ticking(), **BUDGET, **stopped_in("teacher")).run()
    kept = load_forecast(tmp_path / "forecast.json")
    report = compression(llama, tmp_path, clock=ticking(), **BUDGET).run(resume=True).report
    assert kept is not None
    assert report["forecast"] == kept.seconds


@pytest.mark.parametrize(("held_out", "attempts"), [(4, 1), (6, 1), (20, 2)])
def test_an_answer_takes_what_the_model_took_for_it(
    llama: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held_out: int, attempts: int
) -> None:
    """However few questions are held out, and where some were answered before."""
    now, found = 0.0, list[float]()

    def generate(prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
        nonlocal now
        now += len(prompts)
        return [[40, 41, 42] for _ in prompts]

    def measured(context: Any, pairs: list[TrainingPair], settings: Any, gold: float, *_: Any) -> None:
        found.append(gold)
        raise Stopped

    monkeypatch.setattr("softbatch.prompt_store.compression.pipeline.measure_speeds", measured)
    options = BUDGET | {"held_out": held_out, "generate": generate, "clock": lambda: now}
    for attempt in range(attempts):
        with pytest.raises(Stopped):
            compression(llama, tmp_path, **options).run(resume=attempt > 0)
    assert len(found) == attempts
    assert all(0.5 <= seconds <= 1 for seconds in found)


def test_a_question_that_is_left_over_does_not_tell_what_many_take(
    llama: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, found = 0.0, list[float]()

    def generate(prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
        nonlocal now
        now += 0.1 + 0.02 * len(prompts)
        return [[40, 41, 42] for _ in prompts]

    def measured(context: Any, pairs: list[TrainingPair], settings: Any, gold: float, *_: Any) -> None:
        found.append(gold)
        raise Stopped

    monkeypatch.setattr("softbatch.prompt_store.compression.pipeline.measure_speeds", measured)
    with pytest.raises(Stopped):
        compression(llama, tmp_path, **BUDGET, held_out=9, generate=generate, clock=lambda: now).run()
    assert found[0] <= 0.1 / 4 + 0.02 + 1e-9, "four at a time were asked"
