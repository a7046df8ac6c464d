"""A described model without transformers: its parts by name, with all numbers and weights that the kernels are given.

To import transformers' models takes longer than to read the weights of a small one. A model that was outlined once is
read again without them; it runs in the kernels alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import msgspec
import torch
from torch import nn

from softbatch.scheduler.model.family import Family
from softbatch.scheduler.model.llama.description import (
    activation_of,
    is_described,
    long_rotary_of,
    rotary_of,
    rotary_of_layers,
    shape_of,
)

Number = bool | int | float | str | None
_ACTIVATIONS = ("act_fn", "activation_fn")


class Part(msgspec.Struct, frozen=True):
    """A module: how it is made, and its own numbers."""

    made_as: str
    numbers: dict[str, Number]


class Outline(msgspec.Struct, frozen=True):
    """`kind` is the model's class, `parts` its modules by name, the outer before the inner. `weights` has for each
    parameter the tensor of the model's files that it is."""

    kind: str
    config: dict[str, Any]
    parts: dict[str, Part]
    weights: dict[str, str]
    embedding: str


class OutlinedConfig:
    """The fields of a config, for whoever reads it as transformers' own."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self.__dict__.update(fields)

    def get_text_config(self) -> OutlinedConfig:
        return self


class _Outlined(nn.Module):
    """What a model offers beside its parts."""

    config: OutlinedConfig
    embedding: str

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def get_input_embeddings(self) -> nn.Module:
        return self.get_submodule(self.embedding)


class _ScaledEmbedding(nn.Embedding):
    """Gemma's."""

    embed_scale: torch.Tensor

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * self.embed_scale.to(self.weight.dtype)


_MAKERS: Mapping[str, Callable[[], nn.Module]] = {
    "part": nn.Module,
    "list": nn.ModuleList,
    "linear": lambda: nn.Linear(1, 1, bias=False),
    "embedding": lambda: nn.Embedding(1, 1),
    "scaled embedding": lambda: _ScaledEmbedding(1, 1),
    "silu": nn.SiLU,
    "gelu": lambda: nn.GELU(approximate="tanh"),
}


def outline_of(model: Any, stored: Collection[str]) -> Outline | None:
    """None where what comes of it would not be the same; `stored` are the tensors in the model's files."""
    config = model.config
    if not is_described(model) or config.get_text_config() is not config:
        return None
    parts = {name: _part_of(model, name, module) for name, module in model.named_modules()}
    numbers = [number for part in parts.values() for number in part.numbers.values()]
    weights = _origins(model, stored)
    if weights is None or not all(math.isfinite(number) for number in numbers if isinstance(number, float)):
        return None
    embedding = next(name for name, module in model.named_modules() if module is model.get_input_embeddings())
    fields = json.loads(config.to_json_string(use_diff=False))
    outline = Outline(type(model).__name__, fields, parts, weights, embedding)
    outline = msgspec.json.decode(msgspec.json.encode(outline), type=Outline)  # as it will be read
    own = {origin: model.get_parameter(name).detach() for name, origin in weights.items()}
    return outline if _agree(model, read_outlined(outline, own.__getitem__, dict(model.named_buffers()))) else None


def read_outlined(
    outline: Outline, weight: Callable[[str], torch.Tensor], buffers: Mapping[str, torch.Tensor]
) -> nn.Module:
    """The model, of the tensors that `weight` gives by their names in the model's files. It cannot run by itself."""
    model: _Outlined = type(outline.kind, (_Outlined,), {})()
    model.config, model.embedding = OutlinedConfig(outline.config), outline.embedding
    for name, part in outline.parts.items():
        module = _MAKERS[part.made_as]() if name else model
        if name:
            parent, _, own = name.rpartition(".")
            model.get_submodule(parent).add_module(own, module)
        for number, value in part.numbers.items():
            setattr(module, number, value)
    read = {origin: nn.Parameter(weight(origin), requires_grad=False) for origin in set(outline.weights.values())}
    for name, origin in outline.weights.items():
        parent, _, own = name.rpartition(".")
        model.get_submodule(parent).register_parameter(own, read[origin])
    for name, buffer in buffers.items():
        parent, _, own = name.rpartition(".")
        model.get_submodule(parent).register_buffer(own, buffer, persistent=False)
    return model.eval()


def _part_of(model: Any, name: str, module: Any) -> Part:
    parent, _, own = name.rpartition(".")
    numbers = {
        number: value
        for number, value in vars(module).items()
        if not number.startswith("_") and isinstance(value, bool | int | float | str | None)
    }
    if type(module) is nn.Linear:
        return Part("linear", numbers)
    if isinstance(module, nn.Embedding):
        return Part("scaled embedding" if hasattr(module, "embed_scale") else "embedding", numbers)
    if isinstance(module, nn.ModuleList):
        return Part("list", numbers)
    if own in _ACTIVATIONS:
        return Part(activation_of(model.get_submodule(parent)) or "part", {})
    return Part("part", numbers)


def _origins(model: Any, stored: Collection[str]) -> dict[str, str] | None:
    """None where a parameter is no tensor of the files as it stands there."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    origins: dict[str, str] = {}
    for of_one in names.values():
        origin = next((name for name in of_one if name in stored), None)
        if origin is None:
            return None
        origins |= dict.fromkeys(of_one, origin)
    return origins


def _agree(model: Any, outlined: Any) -> bool:
    """Whether both say the same of everything but the weights."""
    tokens = torch.arange(min(8, model.get_input_embeddings().weight.shape[0]))
    embedded = [each.get_input_embeddings()(tokens) for each in (model, outlined)]
    turned = [[*rotary_of(each), long_rotary_of(each)] for each in (model, outlined)]
    return bool(
        all(one is other or torch.equal(one, other) for one, other in (embedded, *zip(*turned, strict=True)))
        and Family.of(model.config) == Family.of(outlined.config)
        and shape_of(model) == shape_of(outlined)
        and rotary_of_layers(model) == rotary_of_layers(outlined)
        and is_described(outlined)
    )
