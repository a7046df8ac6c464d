"""Whom a death of the engine is blamed on, and when an engine counts as hung."""

from __future__ import annotations

from softbatch.scheduler.protocol import AddRequest, EngineConfig, SamplingParams, SoftPromptRef
from softbatch.server.requests.active_request import ActiveRequest
from softbatch.server.requests.quarantine import SURVIVAL_SECONDS, Quarantine
from softbatch.server.requests.watchdog import TICK_SECONDS, Watchdog, seconds_of_full_step

LATER = 10.0 + SURVIVAL_SECONDS + 0.1


def requests(*names: str, soft_prompt: str | None = None) -> list[ActiveRequest]:
    ref = SoftPromptRef(soft_prompt, "", 4) if soft_prompt else None
    adds = [AddRequest(request_id=name, token_ids=[1, 2], params=SamplingParams(), soft_prompt=ref) for name in names]
    return [ActiveRequest.of(add, None, "", 0.0) for add in adds]


def run(quarantine: Quarantine, sent: list[ActiveRequest], alive_since: float | None = None) -> None:
    for request in sent:
        request.start_sequence()
        request.state = "running"
        request.alive_since = alive_since
        quarantine.admitted(request)


def die(quarantine: Quarantine, active: list[ActiveRequest], now: float) -> ActiveRequest | None:
    convicted = quarantine.engine_died(active, now)
    for request in active:
        request.end_sequence()
    return convicted


def test_two_deaths_put_requests_on_trial_one_by_one_and_a_third_convicts_one() -> None:
    quarantine, active = Quarantine(), requests("a", "b", "c")
    for _ in range(2):
        sent = quarantine.next_to_run(active)
        assert sent == active
        run(quarantine, sent)
        assert die(quarantine, active, 10.0) is None
    a, b, c = active
    assert quarantine.next_to_run(active) == [a]
    run(quarantine, [a])
    a.alive_since = 10.0
    assert not quarantine.has_survived(a, 11.0)
    assert quarantine.has_survived(a, LATER)
    a.deaths = 0
    a.end_sequence()
    assert quarantine.next_to_run(active) == [b]
    run(quarantine, [b])
    assert die(quarantine, active, 10.0) is b
    active.remove(b)
    assert (a.deaths, c.deaths) == (0, 2)
    assert quarantine.next_to_run(active) == [c]
    active.remove(c)
    assert quarantine.next_to_run(active) == [a]
    assert quarantine.on_trial is None


def test_who_has_lived_for_a_while_or_only_waits_is_not_struck() -> None:
    quarantine, (old, waiting) = Quarantine(), requests("old", "waiting")
    for _ in range(5):
        run(quarantine, [old], alive_since=10.0)
        waiting.start_sequence()
        assert die(quarantine, [old, waiting], LATER) is None
    assert (old.deaths, waiting.deaths) == (0, 0)


def test_survival_counts_from_the_newest_engine_on() -> None:
    quarantine, (request,) = Quarantine(), requests("a")
    for now in (10.0, 10.0, LATER, 10.0):
        assert quarantine.on_trial is None
        run(quarantine, quarantine.next_to_run([request]), alive_since=10.0)
        assert die(quarantine, [request], now) is None
    assert request.deaths == 1


def test_a_soft_prompt_that_nobody_has_used_yet_makes_those_who_wait_for_it_suspects() -> None:
    quarantine, (first, second) = Quarantine(), requests("a", "b", soft_prompt="f" * 64)
    first.start_sequence()
    second.start_sequence()
    die(quarantine, [first, second], 10.0)
    assert (first.deaths, second.deaths) == (1, 1)
    run(quarantine, [first], alive_since=10.0)
    second.start_sequence()
    die(quarantine, [first, second], LATER)
    assert (first.deaths, second.deaths) == (0, 1)


def test_a_resumed_request_brings_what_it_has_received_and_a_new_name() -> None:
    (request,) = requests("a")
    first = request.start_sequence()
    assert (first.request_id, first.token_ids, first.num_delivered) == ("a", [1, 2], 0)
    request.received += [7, 8, 9]
    request.end_sequence()
    second = request.start_sequence()
    assert second.request_id != "a"
    assert (second.token_ids, second.num_delivered) == ([1, 2, 7, 8, 9], 3)
    assert request.prompt_tokens == 2


def test_an_engine_hangs_when_it_is_silent_or_its_step_has_no_end() -> None:
    watchdog = Watchdog()
    for _ in range(100):  # loading takes long
        watchdog.tick(TICK_SECONDS)
    assert watchdog.complaint is None
    watchdog.heard()
    watchdog.expect_steps(20.0)
    for second in range(20):  # a long step, with heartbeats
        watchdog.heard(float(second))
        watchdog.tick(1.0)
        assert watchdog.complaint is None
    watchdog.heard(20.5)
    assert "step" in (watchdog.complaint or "")
    watchdog.heard()
    assert watchdog.complaint is None
    watchdog.tick(1000.0)  # this process had been stopped, too
    assert watchdog.complaint is None
    for _ in range(50):
        watchdog.tick(TICK_SECONDS)
    assert "no sign of life" in (watchdog.complaint or "")


def test_a_large_model_may_take_longer_for_a_step() -> None:
    config = EngineConfig(model="m", max_batch_tokens=1024)
    assert 60 < seconds_of_full_step(config, 135_000_000, is_on_gpu=False) < 120
    assert seconds_of_full_step(config, 7_000_000_000, is_on_gpu=False) > 600
    assert seconds_of_full_step(config, 7_000_000_000, is_on_gpu=True) < 120
