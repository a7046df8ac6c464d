"""σ itself: the trainable tensors, and the prefix they put in front of the frozen model."""

from __future__ import annotations

import torch
from torch import Tensor

from softbatch.prompt_store.compression.compression_settings import Kind
from softbatch.prompt_store.compression.frozen.frozen_model import Decoder
from softbatch.prompt_store.compression.frozen.prefix import Prefix


class Student:
    """The model behind σ. Owns the fp32 master tensors; the model's own weights never change.

    kind `kv`: keys and values [layers, n, kv_heads, head_dim], keys as queries at n, n + 1, … meet them; slot 0 (the
    attention sink) is frozen. kind `embeddings`: [n, hidden] in the input embedding space.
    """

    def __init__(self, decoder: Decoder, kind: Kind, tensors: dict[str, Tensor]) -> None:
        names = {"kv": {"keys", "values"}, "embeddings": {"embeddings"}}
        if kind not in names:
            raise ValueError(f"kind must be one of {', '.join(sorted(names))}, got {kind!r}")
        if set(tensors) != names[kind]:
            raise ValueError(f"kind {kind} takes the tensors {', '.join(sorted(names[kind]))}")
        self.decoder = decoder
        self.kind: Kind = kind
        master = torch.promote_types(decoder.dtype, torch.float32)
        held = {name: tensor.detach().to(decoder.device, master).clone() for name, tensor in tensors.items()}
        self.sink = {name: tensor[:, :1] for name, tensor in held.items()} if kind == "kv" else {}
        self.trainable = {
            name: (tensor[:, 1:].contiguous() if kind == "kv" else tensor).requires_grad_()
            for name, tensor in held.items()
        }

    @classmethod
    def from_prefix(cls, decoder: Decoder, prefix: Prefix) -> Student:
        return cls(decoder, "kv", {"keys": prefix.keys, "values": prefix.values})

    def prefix(self) -> Prefix:
        """The KV that σ stands for; differentiable in `trainable`."""
        if self.kind == "embeddings":
            return self.decoder.prefill(self.trainable["embeddings"])
        whole = {name: torch.cat((self.sink[name], part), dim=1) for name, part in self.trainable.items()}
        return Prefix(whole["keys"], whole["values"])

    def fixed_prefix(self) -> Prefix:
        """The same KV for use without gradients."""
        with torch.no_grad():
            return self.prefix().detach()

    def tensors(self) -> dict[str, Tensor]:
        """σ as a soft prompt file holds it, detached copies."""
        if self.kind == "embeddings":
            return {"embeddings": self.trainable["embeddings"].detach().clone()}
        prefix = self.fixed_prefix()
        return {"keys": prefix.keys.clone(), "values": prefix.values.clone()}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take over σ from `tensors` of the same shape."""
        with torch.no_grad():
            for name, part in self.trainable.items():
                part.copy_(tensors[name][:, 1:] if self.kind == "kv" else tensors[name])
