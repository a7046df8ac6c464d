"""The student behind σ: equal to plain transformers, right gradients, and one forward for teacher and student."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from softbatch.prompt_store.compression.frozen.frozen_model import Decoder, Kernels
from softbatch.prompt_store.compression.frozen.greedy import greedy
from softbatch.prompt_store.compression.frozen.pairs import answer_states, collate
from softbatch.prompt_store.compression.frozen.prefix import Prefix, attend
from softbatch.prompt_store.compression.frozen.rendering import TrainingPair
from softbatch.prompt_store.compression.frozen.untrained_start import (
    chosen_positions,
    moved_prefix,
    rotated,
    truncated_ids,
)
from softbatch.prompt_store.compression.objectives import objective_from_hidden
from softbatch.prompt_store.compression.training.hidden_states import Observed, hidden_states_of
from softbatch.prompt_store.compression.training.matching import (
    LayerView,
    MatchingSettings,
    _fill_gradients,
    fit,
    matching_error,
    selected,
    with_best_values,
)
from softbatch.prompt_store.compression.training.student import Student
from softbatch.scheduler.model.attention import cpu
from softbatch.scheduler.model.llama.training import CpuModelKernels
from softbatch.scheduler.model.loader import load_transformers
from softbatch.scheduler.model.source import resolve
from softbatch.server.compressions.session import CPU_KERNELS
from tests.support.models import Reference
from tests.support.students import double_llama, random_prefix

PAIRS = [
    TrainingPair((5, 6, 7), (8, 9, 10, 11)),
    TrainingPair((15, 16, 17, 18, 19), (21, 2)),
    TrainingPair((31,), (32, 33, 34, 35, 36, 37)),
    TrainingPair((41, 42), (43,)),
]


def decoder_of(reference: Reference) -> Decoder:
    return Decoder(copy.deepcopy(reference.model))


def plain_logits(model: Any, pair: TrainingPair, sigma: dict[str, torch.Tensor]) -> torch.Tensor:
    """Answer logits by transformers alone, one row, no padding."""
    ids = torch.tensor([[*pair.prompt, *pair.answer[:-1]]])
    if "embeddings" in sigma:
        embeds = torch.cat([sigma["embeddings"][None], model.get_input_embeddings()(ids)], dim=1)
        logits = model(inputs_embeds=embeds).logits
    else:
        cache = DynamicCache(config=model.config)
        for layer in range(sigma["keys"].shape[0]):
            cache.update(
                sigma["keys"][layer][None].transpose(1, 2), sigma["values"][layer][None].transpose(1, 2), layer
            )
        logits = model(ids, past_key_values=cache).logits
    return logits[0, -len(pair.answer) :]


@pytest.mark.parametrize("attention", ["plain", "kernel"])
@pytest.mark.parametrize("kind", ["kv", "embeddings"])
def test_student_equals_plain_transformers(tiny: Reference, kind: Any, attention: str) -> None:
    """Padded batch of ragged rows behind σ, against one row at a time with past_key_values or inputs_embeds."""
    if attention == "kernel" and not cpu.build():
        pytest.skip("no C++ compiler")
    calls: list[int] = []

    def kernel(*inputs: Any) -> torch.Tensor:
        calls.append(1)
        return cpu.behind_prefix(*inputs)

    model = copy.deepcopy(tiny.model)
    decoder = Decoder(model, kernels=Kernels(attend_without_gradients=kernel) if attention == "kernel" else None)
    calls.clear()
    prefix = random_prefix(decoder, 6)
    sigma = (
        {"keys": prefix.keys, "values": prefix.values}
        if kind == "kv"
        else {"embeddings": torch.randn(6, decoder.geometry.hidden) * 0.3}
    )
    student = Student(decoder, kind, sigma)
    states = hidden_states_of(decoder, [student.fixed_prefix()], PAIRS, batch_size=4).states
    with torch.no_grad():
        for pair, found in zip(PAIRS, states, strict=True):
            expected = plain_logits(tiny.model, pair, sigma)
            assert torch.allclose(decoder.project(found), expected, atol=2e-4, rtol=1e-4)
    assert bool(calls) == (attention == "kernel")
    calls.clear()
    answer_states(decoder, student.prefix(), collate(PAIRS, [0, 1], decoder.device)).sum().backward()
    assert not calls


@pytest.mark.parametrize("kind", ["kv", "embeddings"])
@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_gradient_of_sigma_against_finite_differences(kind: Any, alpha: float) -> None:
    decoder = double_llama()
    teacher = hidden_states_of(decoder, [random_prefix(decoder, 9, 1)], PAIRS).states
    prefix = random_prefix(decoder, 3)
    sigma = (
        {"keys": prefix.keys, "values": prefix.values}
        if kind == "kv"
        else {"embeddings": torch.randn(3, decoder.geometry.hidden, dtype=torch.float64)}
    )
    student = Student(decoder, kind, sigma)
    batch = collate(PAIRS, [0, 1, 2, 3], decoder.device)
    targets = torch.cat(teacher)

    def loss() -> torch.Tensor:
        states = answer_states(decoder, student.prefix(), batch)
        return objective_from_hidden(states, targets, batch.gold, decoder.head, alpha, 4)

    loss().backward()
    generator = torch.Generator().manual_seed(3)
    for part in student.trainable.values():
        assert part.grad is not None
        direction = torch.randn(part.shape, generator=generator, dtype=torch.float64)
        expected = (part.grad * direction).sum().item()
        step = 1e-3  # the norms compute in float32 whatever the model does
        with torch.no_grad():
            part += step * direction
            above = loss().item()
            part -= 2 * step * direction
            below = loss().item()
            part += step * direction
        assert (above - below) / (2 * step) == pytest.approx(expected, rel=2e-3, abs=1e-6)


@pytest.mark.parametrize("kind", ["kv", "embeddings"])
@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_gradients_through_the_kernels_are_those_of_autograd(llama: Reference, kind: Any, alpha: float) -> None:
    """Of the objective, and of matching; on a padded batch of ragged rows."""
    if not cpu.build():
        pytest.skip("no C++ compiler")
    plain, fast = decoder_of(llama), Decoder(copy.deepcopy(llama.model), kernels=CPU_KERNELS)
    assert isinstance(fast._model_kernels, CpuModelKernels)
    full = random_prefix(plain, 9, 1)
    teacher_outputs = hidden_states_of(plain, [full], PAIRS, 4, observe=4, virtual_tokens=5)
    prefix = random_prefix(plain, 5)
    sigma = (
        {"keys": prefix.keys, "values": prefix.values}
        if kind == "kv"
        else {"embeddings": torch.randn(5, plain.geometry.hidden) * 0.3}
    )
    found = []
    for decoder in (plain, fast):
        student = Student(decoder, kind, sigma)
        batch = collate(PAIRS, [0, 1, 2, 3], decoder.device)
        loss = decoder.objective(
            answer_states(decoder, student.prefix(), batch), torch.cat(teacher_outputs.states), batch.gold, alpha
        )
        loss.backward()
        gradients = [part.grad.clone() for part in student.trainable.values() if part.grad is not None]
        for part in student.trainable.values():
            part.grad = None
        error = _fill_gradients(teacher_outputs.observed[0], student)
        gradients += [part.grad for part in student.trainable.values() if part.grad is not None]
        assert len(gradients) == 2 * len(student.trainable)
        found.append((loss.item(), error, gradients))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5)
    assert found[1][1] == pytest.approx(found[0][1], rel=1e-5)
    for own, expected in zip(found[1][2], found[0][2], strict=True):
        assert (own - expected).norm() < 1e-4 * expected.norm()


def test_bfloat16_is_near_float32_far_from_the_beginning(llama: Reference) -> None:
    """Rotary frequencies stay float32: rounded like weights, they would turn queries at 1,500 somewhere else."""
    if not cpu.build():
        pytest.skip("no C++ compiler")
    model, _ = load_transformers(resolve(llama.path), torch.bfloat16, torch.device("cpu"))
    model.set_attn_implementation("eager")
    ids = torch.randint(1000, (1500,), generator=torch.Generator().manual_seed(1)).tolist()
    pairs = [TrainingPair((index,), (5, 6, 7, 8)) for index in range(8)]
    exact, rounded = decoder_of(llama), Decoder(model, kernels=CPU_KERNELS)
    assert rounded.body.rotary_emb.inv_freq.dtype == torch.float32
    states = [
        torch.cat(hidden_states_of(decoder, [decoder.encode(ids)], pairs).states).float()
        for decoder in (exact, rounded)
    ]
    assert (states[1] - states[0]).norm() < 0.02 * states[0].norm()


def test_kl_is_zero_when_the_student_is_the_teacher(tiny: Reference) -> None:
    decoder = decoder_of(tiny)
    prefix = random_prefix(decoder, 5)
    teacher = hidden_states_of(decoder, [prefix], PAIRS, batch_size=2).states
    student = Student.from_prefix(decoder, prefix)
    batch = collate(PAIRS, [0, 1, 2, 3], decoder.device)
    states = answer_states(decoder, student.prefix(), batch)
    loss = objective_from_hidden(states, torch.cat(teacher), batch.gold, decoder.head, 0.0)
    assert abs(loss.item()) < 1e-6


def test_slot_zero_is_frozen_and_the_model_too() -> None:
    decoder = double_llama()
    student = Student.from_prefix(decoder, random_prefix(decoder, 4))
    assert student.trainable["keys"].shape[1] == 3
    assert not any(parameter.requires_grad for parameter in decoder.model.parameters())
    student.prefix().keys.sum().backward()
    assert all(parameter.grad is None for parameter in decoder.model.parameters())


def test_greedy_equals_transformers_generate(tiny: Reference) -> None:
    decoder = decoder_of(tiny)
    context = list(range(100, 130))
    prompts = [list(pair.prompt) for pair in PAIRS]
    found = greedy(decoder, decoder.encode(context), prompts, 6, {2}, batch_size=3)
    for prompt, answer in zip(prompts, found, strict=True):
        assert answer == tiny.generate(context + prompt, 6)


def test_rotated_keys_are_those_of_the_new_positions(tiny: Reference) -> None:
    """Layer 0 keys depend on token and position alone: moving them must give what another position gives."""
    decoder = decoder_of(tiny)
    if not hasattr(decoder.body, "rotary_emb"):
        pytest.skip("the model has no rotary positions")
    keys = decoder.encode([7, 50, 51, 52, 53]).keys
    later = decoder.encode([9, 9, 9, 50, 51, 52, 53]).keys[0]
    moved = rotated(decoder, keys[:, 1:].transpose(1, 2), torch.tensor([2, 2, 2, 2]))[0].transpose(0, 1)
    assert torch.allclose(moved, later[3:], atol=1e-4)
    whole = decoder.encode(list(range(40, 60)))
    start = moved_prefix(decoder, [whole], [0, 7, 12])
    assert torch.allclose(start.keys[0, 1], decoder.encode([40, 47]).keys[0, 1], atol=1e-4)


def test_all_positions_chosen_is_the_full_context(tiny: Reference) -> None:
    decoder = decoder_of(tiny)
    whole = decoder.encode(list(range(40, 60)))
    start = moved_prefix(decoder, [whole], chosen_positions(20, 20, 3, 2))
    assert torch.allclose(start.keys, whole.keys, atol=1e-5)


@pytest.mark.parametrize("count", [1, 2, 5, 7, 64, 199, 200])
def test_chosen_positions_are_ordered_and_cover_the_context(count: int) -> None:
    chosen = chosen_positions(200, count, 4, 2)
    assert len(chosen) == count
    assert sorted(set(chosen)) == chosen
    assert chosen[0] >= 0
    assert chosen[-1] < 200
    with pytest.raises(ValueError, match="virtual_tokens"):
        chosen_positions(3, 4, 0, 0)
    assert truncated_ids(list(range(10)), 5, 2) == [0, 1, 2, 8, 9]


def test_attention_of_matching_is_the_models_own() -> None:
    """Over the full context's KV the observed outputs come back exactly: the fit starts from the right function."""
    decoder = double_llama()
    prefix = decoder.encode(list(range(3, 20)))
    observed = hidden_states_of(decoder, [prefix], PAIRS, 4, observe=4, virtual_tokens=prefix.length).observed
    assert len(observed) == 1
    for layer in range(decoder.geometry.layers):
        seen = LayerView.of(observed[0], layer, torch.float64)
        keys, values = prefix.keys[layer].transpose(0, 1), prefix.values[layer].transpose(0, 1)
        output = attend(seen.query, seen.key, seen.value, keys, values, decoder.scale)
        assert torch.allclose(output * seen.valid[:, None, :, None], seen.output * seen.valid[:, None, :, None])


def test_attention_in_slices_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no gradient is needed, a long context does not take memory for the whole batch at once."""
    decoder = double_llama()
    prefix = decoder.encode(list(range(3, 20)))
    whole = hidden_states_of(decoder, [prefix], PAIRS, 4).states
    monkeypatch.setattr("softbatch.prompt_store.compression.frozen.prefix.MAX_WEIGHTS", 1)
    for state, expected in zip(hidden_states_of(decoder, [prefix], PAIRS, 4).states, whole, strict=True):
        assert torch.allclose(state, expected, rtol=1e-12)


def test_moving_the_observation_keeps_the_attention() -> None:
    """The student stands at position n and not at the context's length: all rotates together, nothing changes."""
    decoder = double_llama()
    prefix = decoder.encode(list(range(3, 20)))
    observed = hidden_states_of(decoder, [prefix], PAIRS, 4, observe=4, virtual_tokens=5).observed
    keys = rotated(decoder, prefix.keys.transpose(1, 2), torch.full((17,), 5 - 17))
    seen = LayerView.of(observed[0], 1, torch.float64)
    output = attend(seen.query, seen.key, seen.value, keys[1], prefix.values[1].transpose(0, 1), decoder.scale)
    assert torch.allclose(output * seen.valid[:, None, :, None], seen.output * seen.valid[:, None, :, None])


def error_of(prefix: Prefix, observed: list[Observed], scale: float) -> float:
    layers = range(prefix.keys.shape[0])
    keys, values = prefix.keys.transpose(1, 2), prefix.values.transpose(1, 2)
    views = [(layer, LayerView.of(seen, layer, keys.dtype)) for seen in observed for layer in layers]
    return sum(float(matching_error(view, keys[layer], values[layer], scale)) for layer, view in views)


def test_matching_lowers_the_error_at_every_move_and_keeps_slot_zero() -> None:
    decoder = double_llama()
    full = decoder.encode(list(range(3, 40)))
    observed = hidden_states_of(decoder, [full], PAIRS, 2, observe=4, virtual_tokens=6).observed
    plain = moved_prefix(decoder, [full], chosen_positions(37, 6, 2, 1))
    start = selected(decoder, [full], observed, 6)
    solved = with_best_values(start, observed, decoder.scale)
    settings = MatchingSettings(steps=60, key_rate=0.05, value_rate=0.05)
    student = Student.from_prefix(decoder, start)
    fit(student, observed, settings)
    fitted = student.fixed_prefix()
    errors = [error_of(prefix, observed, decoder.scale) for prefix in (plain, start, solved, fitted)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.5 * errors[0]
    for prefix in (solved, fitted):
        assert torch.equal(prefix.keys[:, 0], start.keys[:, 0])
        assert torch.equal(prefix.values[:, 0], start.values[:, 0])


def test_all_of_the_context_selected_is_the_teacher() -> None:
    """As many slots as tokens, in two segments: each question's attention over its own comes back exactly."""
    decoder = double_llama()
    full = decoder.encode(list(range(3, 12)))
    observed = hidden_states_of(decoder, [full], PAIRS, 4, observe=4, virtual_tokens=9).observed
    everything = selected(decoder, [full], observed, 9)
    assert error_of(everything, observed, decoder.scale) < 1e-20
    assert torch.allclose(everything.keys, full.keys)
    long, short = decoder.encode(list(range(3, 30))), decoder.encode(list(range(20, 50)))
    pairs = [replace(pair, group=index % 2) for index, pair in enumerate(PAIRS)]
    observed = hidden_states_of(decoder, [long, short], pairs, 2, observe=4, virtual_tokens=7).observed
    assert {seen.group for seen in observed} == {0, 1}
    chosen = selected(decoder, [long, short], observed, 7)
    assert torch.allclose(chosen.values[:, 0], long.values[:, 0]), "the sink stays first"
    assert chosen.length == 7


def test_embeddings_are_matched_through_the_model() -> None:
    decoder = double_llama()
    full = decoder.encode(list(range(3, 40)))
    observed = hidden_states_of(decoder, [full], PAIRS, 2, observe=4, virtual_tokens=6).observed
    student = Student(decoder, "embeddings", {"embeddings": decoder.embed(torch.arange(3, 9))})
    before = error_of(student.fixed_prefix(), observed, decoder.scale)
    fit(student, observed, MatchingSettings(steps=60, embedding_rate=0.05))
    assert error_of(student.fixed_prefix(), observed, decoder.scale) < 0.7 * before


@pytest.mark.parametrize("kind", ["kv", "embeddings"])
def test_matching_goes_on_from_its_checkpoint(kind: str, tmp_path: Path) -> None:
    decoder = double_llama()
    full = decoder.encode(list(range(3, 40)))
    observed = hidden_states_of(decoder, [full], PAIRS, 2, observe=4, virtual_tokens=6).observed
    settings = MatchingSettings(steps=12)

    def start() -> Student:
        if kind == "kv":
            return Student.from_prefix(decoder, selected(decoder, [full], observed, 6))
        return Student(decoder, "embeddings", {"embeddings": decoder.embed(torch.arange(3, 9))})

    whole, cut, again = start(), start(), start()
    fit(whole, observed, settings)
    ticks = itertools.count(step=16.0)

    def interrupt(step: int, _: float) -> None:
        if step == 5:
            raise KeyboardInterrupt

    path = tmp_path / "matching.safetensors"
    with pytest.raises(KeyboardInterrupt):
        fit(cut, observed, settings, lambda: next(ticks), interrupt, path)
    steps: list[int] = []
    fit(again, observed, settings, on_step=lambda step, _: steps.append(step), checkpoint=path)
    assert steps[0] == 6
    for name, tensor in whole.tensors().items():
        assert torch.equal(again.tensors()[name], tensor)
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match=r"matching\.safetensors in the work directory cannot be read"):
        fit(again, observed, settings, checkpoint=path)
