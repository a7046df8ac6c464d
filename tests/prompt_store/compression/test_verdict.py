"""What is promised before a compression, and what is said about it behind it."""

from __future__ import annotations

from typing import Any

import pytest

from softbatch.prompt_store.compression.compression_settings import CompressionSettings
from softbatch.prompt_store.compression.evaluation.verdict import verdict_of
from softbatch.prompt_store.compression.forecast import MEASURING_SHARE, Speeds, forecast

FAST = Speeds(gold=0.1, full=0.02, scored=0.01, step=0.1)
SLOW = Speeds(gold=3.0, full=1.0, scored=0.3, step=3.0)


def report(steps: int, closed: float | None, untrained: float = 0.3, minutes: float | None = 10.0) -> dict[str, Any]:
    return {
        "kl": 0.1,
        "kl_closed": closed,
        "training": {"steps": steps, "minutes": minutes},
        "baselines": {"untrained": {"kl_closed": untrained}},
    }


@pytest.mark.parametrize(
    ("found", "loss_before", "words"),
    [
        (report(1, 0.4), None, ["too short", "1 training step,", "--minutes"]),
        (report(400, 0.93), 0.101, ["good: 0.93", "400 training steps"]),
        (report(400, 0.93), 0.2, ["good", "still falling"]),
        (report(400, 0.8), 0.1, ["fair", "virtual tokens"]),
        (report(400, 0.5), 0.1, ["weak"]),
        (report(400, 0.02), 0.1, ["learned nothing", "do not use"]),
        (report(400, 0.31), 0.1, ["learned nothing"]),
        (report(400, None), 0.1, ["unknown"]),
        (report(3, 0.5, minutes=None), 0.1, ["weak", "3 training steps"]),
        (report(400, 0.93, minutes=None), 0.2, ["good", "still falling, more steps help"]),
        (report(400, 0.8, minutes=None), 0.1, ["fair", "virtual tokens or steps"]),
    ],
)
def test_a_verdict_follows_from_the_figures(found: dict[str, Any], loss_before: float | None, words: list[str]) -> None:
    said = verdict_of(found, loss_before)
    assert all(word in said for word in words), said


def test_enough_time_changes_nothing_about_the_plan() -> None:
    plan = forecast(FAST, CompressionSettings(), 10, 590, held_out=32, training=2000)
    assert (plan.held_out, plan.free_answers) == (32, 16)
    assert not plan.is_too_short
    assert sum(plan.seconds.values()) == pytest.approx(600, rel=0.02)


def test_a_short_budget_measures_less_and_says_what_it_would_take() -> None:
    plan = forecast(SLOW, CompressionSettings(minutes=3), 20, 160, held_out=32, training=2000)
    assert plan.held_out < 32
    assert plan.is_too_short
    warning = plan.warning(3)
    assert f"--minutes {plan.minutes_needed:g}" in warning
    longer = forecast(SLOW, CompressionSettings(), 20, 60 * plan.minutes_needed - 20, held_out=32, training=2000)
    assert not longer.is_too_short
    assert longer.seconds["evaluation"] < (MEASURING_SHARE + 0.01) * 60 * plan.minutes_needed
