"""MXFP4: four bits a number, 32 of which share a scale, as checkpoints have it and as GGUF files do."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

GROUP = 32  # numbers that share a scale
BLOCKS, SCALES = "_blocks", "_scales"  # behind the names of a checkpoint's matrices
_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_BIAS = 127  # of the scales' exponents


def is_in_blocks(config: Any) -> bool:
    """Whether a checkpoint's experts are, by its config: of the one kind that transformers knows so too."""
    said = getattr(config, "quantization_config", None)
    return (
        isinstance(said, dict)
        and said.get("quant_method") == "mxfp4"
        and config.model_type == "gpt_oss"
        and not any("experts" in name for name in said.get("modules_to_not_convert") or ())
    )


def widened(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """uint8 [..., groups, 16], whose bytes have the lower half first, and [..., groups] as float32 [..., inputs]."""
    values = _pairs(blocks.device)[blocks.int()].view(torch.float32)
    factors = torch.ldexp(torch.ones_like(scales, dtype=torch.float32), scales.int() - _BIAS)
    return values.mul_(factors[..., None]).flatten(-2)


def gguf_rows(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The same matrix as rows of GGUF's blocks [..., bytes]: the scale, then bytes whose lower halves are the first 16
    values."""
    codes = torch.stack((blocks & 0xF, blocks >> 4), -1).flatten(-2)
    halves = codes[..., : GROUP // 2] | codes[..., GROUP // 2 :] << 4
    return torch.cat((scales[..., None], halves), -1).flatten(-2)


def from_gguf_rows(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks and scales of which `gguf_rows` makes `rows`."""
    found = rows.unflatten(-1, (-1, 1 + GROUP // 2))
    halves = found[..., 1:]
    codes = torch.cat((halves & 0xF, halves >> 4), -1)
    return codes[..., ::2] | codes[..., 1::2] << 4, found[..., 0].contiguous()


@cache
def _pairs(device: torch.device) -> torch.Tensor:
    """The two values of each byte, float32, as one number of 64 bits [256], which is looked up faster than two."""
    values = torch.tensor(_VALUES, device=device)
    return torch.stack((values.repeat(16), values.repeat_interleave(16)), -1).view(torch.int64).flatten()
