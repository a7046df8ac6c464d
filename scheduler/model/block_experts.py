"""Experts whose matrices stay in MXFP4 as their checkpoint has them, and are widened one by one where they are used."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from softbatch.scheduler.model.cpu import ops
from softbatch.scheduler.model.cpu.build import build as build_kernels
from softbatch.scheduler.model.cpu.formats import BlockKind
from softbatch.scheduler.model.mxfp4 import BLOCKS, GROUP, SCALES, gguf_rows, widened

MATRICES = ("gate_up_proj", "down_proj")
Numbers = Callable[[torch.Tensor], torch.Tensor]


class BlockExperts(nn.Module):
    """gpt-oss's experts, in place of those of transformers and with the names of its checkpoints."""

    def __init__(self, experts: Any) -> None:
        """On the device of `experts`, without weights."""
        super().__init__()
        self.alpha, self.limit = float(experts.alpha), float(experts.limit)
        for name in MATRICES:
            weight = getattr(experts, name)
            count, inputs, outputs = weight.shape
            sizes = {BLOCKS: (count, outputs, inputs // GROUP, GROUP // 2), SCALES: (count, outputs, inputs // GROUP)}
            for suffix, size in sizes.items():
                empty = torch.empty(size, dtype=torch.uint8, device=weight.device)
                self.register_parameter(name + suffix, nn.Parameter(empty, requires_grad=False))
            self.register_parameter(f"{name}_bias", getattr(experts, f"{name}_bias"))
        self._kernels: Any = None
        self._layer = 0

    def forward(
        self, hidden_states: torch.Tensor, router_indices: torch.Tensor, routing_weights: torch.Tensor
    ) -> torch.Tensor:
        """[T, hidden] with experts and weights [T, k]."""
        dtype = hidden_states.dtype
        if self._kernels is not None:
            found: torch.Tensor = self._kernels.forward(self._layer, hidden_states, router_indices, routing_weights)
            return found.to(dtype)
        result = torch.zeros_like(hidden_states)
        for expert in router_indices.unique().tolist():
            tokens, places = torch.where(router_indices == expert)
            gated = self._gate(self._multiply("gate_up_proj", expert, hidden_states[tokens]))
            out = self._multiply("down_proj", expert, gated) * routing_weights[tokens, places, None]
            result.index_add_(0, tokens, out.to(dtype))
        return result

    def _multiply(self, name: str, expert: int, rows: torch.Tensor) -> torch.Tensor:
        weight = widened(getattr(self, name + BLOCKS)[expert], getattr(self, name + SCALES)[expert])
        return nn.functional.linear(rows, weight.to(rows.dtype), getattr(self, f"{name}_bias")[expert])

    def _gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate = gate_up[..., ::2].clamp(max=self.limit)
        up = gate_up[..., 1::2].clamp(-self.limit, self.limit)
        return (up + 1) * (gate * torch.sigmoid(gate * self.alpha))

    def pack(self, kernels: Any, layer: int) -> None:
        """Leave the weights to `kernels`, as the layer's. Those here go."""
        weights = {name: getattr(self, name) for name, _ in self.named_parameters(recurse=False)}
        for expert in range(weights["down_proj_bias"].shape[0]):
            own = {name: weight[expert] for name, weight in weights.items()}
            rows = gguf_rows(own["gate_up_proj_blocks"], own["gate_up_proj_scales"])
            named = {
                "gate": rows[::2].contiguous(),
                "up": rows[1::2].contiguous(),
                "down": gguf_rows(own["down_proj_blocks"], own["down_proj_scales"]),
                "gate_bias": own["gate_up_proj_bias"][::2],
                "up_bias": own["gate_up_proj_bias"][1::2],
                "down_bias": own["down_proj_bias"],
            }
            kernels.add(layer, named, BlockKind.MXFP4.value)
        for name in weights:
            self.register_parameter(name, None)
        self._kernels, self._layer = kernels, layer

    def weights_in_blocks(self) -> Iterator[tuple[str, tuple[str, ...], torch.Size, Numbers]]:
        """Of each matrix the name that it has where it is widened, the names of its parts here, its shape, and its
        numbers at some places of it when it is flat."""
        for name in MATRICES:
            blocks, scales = getattr(self, name + BLOCKS), getattr(self, name + SCALES)
            count, outputs, groups, _ = blocks.shape
            shape = torch.Size((count, groups * GROUP, outputs))
            yield name, (name + BLOCKS, name + SCALES), shape, partial(_numbers_at, blocks, scales, shape)


def _numbers_at(blocks: torch.Tensor, scales: torch.Tensor, shape: torch.Size, places: torch.Tensor) -> torch.Tensor:
    """Of matrices [experts, inputs, outputs] when these are flat."""
    expert, row, column = torch.unravel_index(places.to(blocks.device), shape)
    group = row // GROUP
    found = widened(blocks[expert, column, group], scales[expert, column, group]).view(-1, GROUP)
    return found.gather(-1, (row % GROUP)[:, None])[:, 0]


def experts_in(model: nn.Module) -> list[BlockExperts]:
    """Layer by layer."""
    return [module for module in model.modules() if isinstance(module, BlockExperts)]


def num_parameters(model: nn.Module) -> int:
    """As many as the model has where its matrices are widened."""
    total = sum(parameter.numel() for parameter in model.parameters())
    for experts in experts_in(model):
        for name in MATRICES:
            total += getattr(experts, name + BLOCKS).numel() - getattr(experts, name + SCALES).numel()
    return total


def pack_experts(model: nn.Module) -> int:
    """Leave experts to the kernels in C++, layer by layer, so that weights never all lie beside their copies; returns
    the bytes there. 0 if there are none, or no kernels."""
    layers = experts_in(model)
    if not layers or not build_kernels():
        return 0
    first = layers[0]
    _, outputs, groups = getattr(first, f"down_proj{SCALES}").shape
    kernels = ops.make_experts(outputs, groups * GROUP, first.alpha, first.limit)
    for layer, experts in enumerate(layers):
        experts.pack(kernels, layer)
    return int(kernels.weight_bytes())
