"""What is the same in all keys of a head before their positions turn them: a packed cache holds only the rest."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class KeyOffsets:
    """`offsets` [layers, kv_heads, head_dim] in float32. `schemes` has each layer's rotary scheme, -1 for none; a
    scheme's `frequencies` [schemes, half] turn the first 2 * half dimensions, `scales` [schemes] stretch them.

    A score is the same for any offsets: what keys lack of it, csrc/llama/position_keys.h puts back.
    """

    offsets: torch.Tensor
    frequencies: torch.Tensor
    scales: torch.Tensor
    schemes: tuple[int, ...]

    def turned(self, count: int) -> torch.Tensor:
        """As the keys at positions 0 to count - 1 have them: [layers, count, kv_heads, head_dim]."""
        half = self.frequencies.shape[1]
        angles = torch.arange(count, dtype=torch.float32)[:, None, None] * self.frequencies.float()
        cosines, sines = angles.cos() * self.scales[:, None], angles.sin() * self.scales[:, None]
        found = self.offsets[:, None].repeat(1, count, 1, 1)
        for layer, scheme in enumerate(self.schemes):
            if scheme < 0:
                continue
            cosine, sine = cosines[:, scheme, None], sines[:, scheme, None]
            low, high = self.offsets[layer, :, :half], self.offsets[layer, :, half : 2 * half]
            found[layer, :, :, :half] = low * cosine - high * sine
            found[layer, :, :, half : 2 * half] = high * cosine + low * sine
        return found
