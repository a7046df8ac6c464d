"""Linear layers whose weights are laid out for the CPU's matrix kernels once, and not at every call."""

from __future__ import annotations

import torch
from torch import nn


class PackedLinear(nn.Module):
    """y = x Wᵀ + b in oneDNN's own weight layout, for serving: without gradients, and not to be saved."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())
        self._bias = linear.bias.detach() if linear.bias is not None else None

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if inputs.numel() == 0:  # a step of prefill chunks alone needs no logits
            return inputs.new_empty(*inputs.shape[:-1], self.out_features)
        output: torch.Tensor = torch.ops.mkldnn._linear_pointwise(inputs, self._packed, self._bias, "none", [], "")
        return output


def pack_linears(model: nn.Module) -> int:
    """Replace the model's bfloat16 linear layers on the CPU by packed ones; returns how many.

    float32 layers stay, for they are the reference. The plain weights are freed, except the output layer's if the input
    embeddings share it.
    """
    if not torch.backends.mkldnn.is_available():
        return 0
    packed = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and child.weight.dtype == torch.bfloat16 and child.weight.device.type == "cpu":
                setattr(parent, name, PackedLinear(child))
                packed += 1
    return packed
