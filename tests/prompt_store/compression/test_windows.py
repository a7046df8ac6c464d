"""Compression for models whose layers differ: how far back they see, and how they turn positions."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from softbatch.prompt_store.compression.frozen.frozen_model import Decoder
from softbatch.prompt_store.compression.frozen.greedy import greedy
from softbatch.prompt_store.compression.frozen.layer_kinds import windows_of
from softbatch.prompt_store.compression.frozen.rendering import TrainingPair
from softbatch.prompt_store.compression.frozen.untrained_start import chosen_positions, moved_prefix, rotated
from softbatch.prompt_store.compression.training.hidden_states import hidden_states_of
from softbatch.prompt_store.compression.training.matching import MatchingSettings, fit, selected
from softbatch.prompt_store.compression.training.student import Student
from softbatch.server.compressions.request import ModelShape
from tests.support.families import FAMILIES, SERVED
from tests.support.students import random_prefix

NAMES = ("Mistral", "Ministral", "Qwen2, Qwen2.5", "Qwen3", "Gemma 3", "SmolLM3", "OLMo 3", "StarCoder2")
CONTEXT = list(range(40, 70))  # more than twice the windows of 13
PROMPTS = [[105, 106, 107], [115, 116, 117, 118, 119], [131]]


def make_model(name: str, dtype: torch.dtype = torch.float32) -> Any:
    kind, fields = SERVED[name]
    torch.manual_seed(4)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(FAMILIES[kind] | fields)), dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
    return model.eval()


def test_contexts_end_where_positions_turn_otherwise() -> None:
    """Behind the original length, those of all rows of a batch would."""
    decoder = Decoder(make_model("Phi-4-mini"))
    assert decoder.window == ModelShape.of(decoder.model.config).max_positions == 40
    assert Decoder(make_model("Llama")).window == FAMILIES["llama"]["max_position_embeddings"]


@pytest.mark.parametrize("name", NAMES)
def test_behind_a_context_it_is_the_model_itself(name: str) -> None:
    """Logits of ragged rows behind a context that is longer than the windows, and greedy answers."""
    model = make_model(name)
    plain = copy.deepcopy(model).requires_grad_(False)
    plain.set_attn_implementation("eager")
    decoder = Decoder(model)
    prefix = decoder.encode(CONTEXT)
    pairs = [TrainingPair(tuple(prompt), (7, 8, 9, *range(200, 216))) for prompt in PROMPTS]
    states = hidden_states_of(decoder, [prefix], pairs, batch_size=4).states
    answers = greedy(decoder, prefix, PROMPTS, 20, set(), batch_size=3)
    with torch.no_grad():
        for pair, found, answer in zip(pairs, states, answers, strict=True):
            whole = [*CONTEXT, *pair.prompt, *pair.answer[:-1]]
            expected = plain(torch.tensor([whole]), use_cache=False).logits[0, -len(pair.answer) :]
            assert torch.allclose(decoder.project(found), expected, atol=3e-4, rtol=1e-3)
            ids = [*CONTEXT, *pair.prompt]
            for token in answer:
                assert int(plain(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()) == token
                ids.append(token)


@pytest.mark.parametrize("length", [6, 16])
@pytest.mark.parametrize("name", ["Mistral", "Gemma 3"])
def test_gradients_behind_windows(name: str, length: int) -> None:
    """Of a prefix that every row sees and of one whose first slots nobody sees, against finite differences."""
    decoder = Decoder(make_model(name, torch.float64))
    prefix = random_prefix(decoder, length)
    tensors = [prefix.keys.clone().requires_grad_(), prefix.values.clone().requires_grad_()]
    embeds = decoder.embed(torch.tensor([[5, 6, 7, 8, 9, 10, 11], [12, 13, 14, 15, 16, 17, 18]]))
    generator = torch.Generator().manual_seed(3)
    weights = torch.randn(2, 7, decoder.geometry.hidden, generator=generator, dtype=torch.float64)

    def loss() -> torch.Tensor:
        return (decoder.forward(embeds, type(prefix)(*tensors)) * weights).sum()

    gradients = torch.autograd.grad(loss(), tensors)
    for part, gradient in zip(tensors, gradients, strict=True):
        direction = torch.randn(part.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            part += 1e-3 * direction
            after = loss()
            part -= 2e-3 * direction
            before = loss()
            part += 1e-3 * direction
        # Norms compute in float32.
        assert torch.allclose((after - before) / 2e-3, (gradient * direction).sum(), rtol=1e-2, atol=5e-3)
    hidden = max(0, length + 1 - 13)
    slides = [window is not None for window in decoder.windows]
    assert not gradients[0][slides, :hidden].any()
    assert gradients[0][:, hidden:].any(dim=(1, 2, 3)).all()


@pytest.mark.parametrize("name", NAMES)
def test_moved_keys_are_those_of_their_new_positions(name: str) -> None:
    """In every layer as it turns its own. A single token behind nothing has the same key but for its position."""
    decoder = Decoder(make_model(name))
    keys = decoder.encode([50]).keys.transpose(1, 2)
    embeds = decoder.embed(torch.tensor([[50]]))
    later: list[torch.Tensor] = []
    nothing = torch.zeros(decoder.geometry.layers, 9, decoder.geometry.kv_heads, decoder.geometry.head_dim)
    far = type(decoder.encode([50]))(nothing - 1e4 * torch.sign(nothing + 1), nothing)
    decoder.forward(embeds, far, on_layer=lambda _, trace: later.append(trace.key[0]))
    assert torch.allclose(rotated(decoder, keys, torch.tensor([9]))[0], later[0], atol=1e-4)
    whole = decoder.encode(CONTEXT)
    start = moved_prefix(decoder, [whole], chosen_positions(len(CONTEXT), len(CONTEXT), 3, 2))
    assert torch.allclose(start.keys, whole.keys, atol=1e-4)


@pytest.mark.parametrize("name", ["Mistral", "Gemma 3"])
def test_matching_with_all_that_is_seen_is_the_teacher(name: str) -> None:
    """Layers with windows keep what questions see, which is not the context's first slot."""
    decoder = Decoder(make_model(name, torch.float64))
    prefix = decoder.encode(CONTEXT)
    pairs = [TrainingPair(tuple(prompt), (7, 8)) for prompt in PROMPTS]
    observed = hidden_states_of(decoder, [prefix], pairs, 4, observe=4, virtual_tokens=12).observed
    start = selected(decoder, [prefix], observed, 12)
    for layer, window in enumerate(decoder.windows):
        if window is not None:  # all twelve that a question's first token sees
            assert torch.allclose(start.values[layer], prefix.values[layer, -12:])
    student = Student.from_prefix(decoder, start)
    errors: list[float] = []
    fit(student, observed, MatchingSettings(steps=20), on_step=lambda _, error: errors.append(error))
    assert errors[-1] <= errors[0] + 1e-3  # what already matches stays so


def test_attention_of_other_kinds_is_refused() -> None:
    config = AutoConfig.for_model("llama", **FAMILIES["llama"])
    config.layer_types = ["full_attention", "chunked_attention"]
    with pytest.raises(ValueError, match="layer_types has chunked_attention, full_attention"):
        windows_of(config)
    with pytest.raises(ValueError, match="attn_logit_softcapping"):
        Decoder(make_model("Gemma 2"))
