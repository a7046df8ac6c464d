"""The training loop: determinism, resume, the budget under a handed-in clock, checkpoints that survive a crash."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from softbatch.prompt_store.compression.frozen.frozen_model import Decoder
from softbatch.prompt_store.compression.frozen.pairs import batches_from, collate, epoch_batches
from softbatch.prompt_store.compression.frozen.rendering import TrainingPair
from softbatch.prompt_store.compression.progress import Progress
from softbatch.prompt_store.compression.training.hidden_states import hidden_states_of
from softbatch.prompt_store.compression.training.schedule import learning_rate_factor
from softbatch.prompt_store.compression.training.student import Student
from softbatch.prompt_store.compression.training.trainer import Trainer, TrainingSettings
from tests.support.students import double_llama, random_prefix

PAIRS = [TrainingPair(tuple(range(3, 5 + n % 4)), tuple(range(20 + n, 24 + n + n % 3))) for n in range(20)]


class Clock:
    """Advances by `step` at every look."""

    def __init__(self, step: float) -> None:
        self.now, self.step = 0.0, step

    def __call__(self) -> float:
        self.now += self.step
        return self.now


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return double_llama()


@pytest.fixture(scope="module")
def teacher(decoder: Decoder) -> list[torch.Tensor]:
    return hidden_states_of(decoder, [decoder.encode(list(range(30, 60)))], PAIRS).states


def trainer_for(decoder: Decoder, teacher: Any, directory: Path | None = None, **options: Any) -> Trainer:
    kind = options.pop("kind", "kv")
    clock = options.pop("clock", Clock(0.01))
    prefix = random_prefix(decoder, 5)
    sigma = (
        {"keys": prefix.keys, "values": prefix.values}
        if kind == "kv"
        else {"embeddings": torch.ones(5, decoder.geometry.hidden)}
    )
    settings = TrainingSettings(**({"steps": 12, "batch_size": 4} | options))
    return Trainer(Student(decoder, kind, sigma), PAIRS, teacher, settings, directory, clock)


def rates_of(trainer: Trainer) -> list[float]:
    """Grows by the learning rate of each step."""
    rates: list[float] = []
    step = trainer._step

    def watched(indices: list[int]) -> float:
        loss = step(indices)
        rates.append(trainer.optimiser.param_groups[0]["lr"])
        return loss

    trainer._step = watched  # type: ignore[method-assign]
    return rates


def same(a: Student, b: Student) -> bool:
    return all(torch.equal(x, b.tensors()[name]) for name, x in a.tensors().items())


@pytest.mark.parametrize("kind", ["kv", "embeddings"])
@pytest.mark.parametrize("objective", ["kl", "nll", "mixed"])
def test_training_lowers_the_loss_and_is_deterministic(
    decoder: Decoder, teacher: Any, kind: str, objective: str
) -> None:
    runs = []
    for seed in (3, 3, 4):
        trainer = trainer_for(decoder, teacher, kind=kind, objective=objective, seed=seed, steps=30, learning_rate=0.05)
        runs.append((trainer.run(), trainer.student))
    first, second, other = runs
    assert same(first[1], second[1])
    assert not same(first[1], other[1])
    losses = [loss for _, _, loss in first[0].curve]
    assert sum(losses[-5:]) < sum(losses[:5])


@pytest.mark.parametrize("kind", ["kv", "embeddings"])
@pytest.mark.parametrize("stop_at", [1, 5, 11])
def test_resume_equals_uninterrupted(decoder: Decoder, teacher: Any, tmp_path: Path, kind: str, stop_at: int) -> None:
    whole = trainer_for(decoder, teacher, kind=kind)
    whole.run()
    first = trainer_for(decoder, teacher, tmp_path, kind=kind)
    result = first.run(should_stop=lambda: first.state.step >= stop_at)
    assert result.stopped
    assert result.steps == stop_at
    second = trainer_for(decoder, teacher, tmp_path, kind=kind)
    assert second.resume()
    assert second.state.step == stop_at
    assert second.run().steps == 12
    assert same(second.student, whole.student)
    assert [row[2] for row in second.state.curve] == [row[2] for row in whole.state.curve]


def test_a_budget_is_kept_and_the_schedule_fills_it(decoder: Decoder, teacher: Any) -> None:
    for tick in (0.05, 0.4):
        clock = Clock(tick)
        trainer = trainer_for(decoder, teacher, steps=None, seconds=30.0, clock=clock)
        rates, began = rates_of(trainer), clock.now
        result = trainer.run()
        assert clock.now - began <= 30.0 + 4 * tick
        assert result.seconds > 30.0 - 8 * tick
        assert rates[-1] < 0.12 * max(rates), "the cosine has come down at the end, whatever a step costs"


def test_time_already_spent_counts(decoder: Decoder, teacher: Any, tmp_path: Path) -> None:
    first = trainer_for(decoder, teacher, tmp_path, steps=None, seconds=20.0, clock=Clock(0.5))
    first.run(should_stop=lambda: first.state.elapsed > 10)
    clock = Clock(0.5)
    second = trainer_for(decoder, teacher, tmp_path, steps=None, seconds=20.0, clock=clock)
    assert second.resume()
    second.run()
    assert clock.now < 12


def test_checkpoints_come_in_time_and_are_whole(decoder: Decoder, teacher: Any, tmp_path: Path) -> None:
    clock = Clock(1.0)
    trainer = trainer_for(decoder, teacher, tmp_path, steps=40, checkpoint_seconds=30.0, clock=clock)
    saved: list[float] = []
    plain_save = trainer.save

    def save() -> None:
        saved.append(clock.now)
        plain_save()
        record = json.loads((tmp_path / "state.json").read_text())
        assert load_file(tmp_path / record["tensors"])["sigma.keys"].isfinite().all()

    trainer.save = save  # type: ignore[method-assign]
    trainer.run()
    gaps = [later - earlier for earlier, later in zip([0.0, *saved], saved, strict=False)]
    assert len(saved) >= 3
    assert max(gaps) <= 60
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
    assert not list(tmp_path.glob("*.tmp"))


def test_a_crash_between_the_two_files_leaves_the_old_checkpoint(
    decoder: Decoder, teacher: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_for(decoder, teacher, tmp_path)
    trainer.run(should_stop=lambda: trainer.state.step >= 3)
    kept = trainer.student.tensors()
    trainer._step([0, 1])
    trainer.state.step += 1
    import softbatch.prompt_store.compression.training.trainer as module

    real = module.replace_file

    def crash(path: Path, write: Any) -> None:
        if path.name == "state.json":
            raise KeyboardInterrupt
        real(path, write)

    monkeypatch.setattr(module, "replace_file", crash)
    with pytest.raises(KeyboardInterrupt):
        trainer.save()
    again = trainer_for(decoder, teacher, tmp_path)
    assert again.resume()
    assert again.state.step == 3
    assert all(torch.equal(part, kept[name]) for name, part in again.student.tensors().items())


def test_another_runs_checkpoint_is_refused(decoder: Decoder, teacher: Any, tmp_path: Path) -> None:
    trainer_for(decoder, teacher, tmp_path, steps=2).run()
    with pytest.raises(ValueError, match="other settings"):
        trainer_for(decoder, teacher, tmp_path, steps=3).resume()
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        trainer_for(decoder, teacher, tmp_path, steps=2).resume()
    assert not trainer_for(decoder, teacher, tmp_path / "empty").resume()


def test_progress_says_what_is_left(decoder: Decoder, teacher: Any) -> None:
    seen: list[Progress] = []
    trainer_for(decoder, teacher, steps=5).run(seen.append)
    assert [progress.done for progress in seen] == [1, 2, 3, 4, 5]
    assert {progress.total for progress in seen} == {5}
    assert seen[-1].seconds_left == 0
    assert all(progress.phase == "training" and progress.loss is not None for progress in seen)


def test_every_pair_is_seen_once_an_epoch() -> None:
    for epoch in range(3):
        order = [index for batch in epoch_batches(PAIRS, 6, 1, epoch) for index in batch]
        assert sorted(order) == list(range(len(PAIRS)))
    assert epoch_batches(PAIRS, 6, 1, 0) != epoch_batches(PAIRS, 6, 1, 1)
    run = batches_from(PAIRS, 6, 1, 0)
    first = [next(run) for _ in range(11)]
    later = batches_from(PAIRS, 6, 1, 7)
    assert first[7:] == [next(later) for _ in range(4)]


def test_collate_points_at_the_states_that_predict_the_answer() -> None:
    batch = collate(PAIRS, [0, 5], torch.device("cpu"))
    at = 0
    for row, index in enumerate((0, 5)):
        pair = PAIRS[index]
        whole = [*pair.prompt, *pair.answer]
        for token in pair.answer:
            column = int(batch.columns[at])
            assert int(batch.rows[at]) == row
            assert batch.ids[row, : column + 1].tolist() == whole[: column + 1]
            assert int(batch.gold[at]) == token == whole[column + 1]
            at += 1
    with pytest.raises(ValueError, match="empty"):
        collate([TrainingPair((1,), ())], [0], torch.device("cpu"))


def test_schedule() -> None:
    values = [learning_rate_factor(n / 100, 0.1, 0.02) for n in range(101)]
    assert max(values) == pytest.approx(1.0, abs=0.01)
    assert values[-1] == pytest.approx(0.02)
    assert values[0] <= 0.1
    assert values[11:] == sorted(values[11:], reverse=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 1, "seconds": 1.0}, "either steps or seconds"),
        ({}, "either steps or seconds"),
        ({"steps": 0}, "steps must lie"),
        ({"seconds": -1.0}, "seconds must lie"),
        ({"steps": 1, "objective": "mse"}, "objective must be one of"),
        ({"steps": 1, "learning_rate": 0.0}, "learning_rate must lie"),
        ({"steps": 1, "batch_size": 0}, "batch_size must lie"),
    ],
)
def test_bad_settings_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainingSettings(**options)
