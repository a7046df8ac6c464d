"""Rows of GGUF's blocks: random ones of every kind, and those nearest to a model's weights."""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np
import torch

from softbatch.scheduler.model.cpu.formats import BlockKind
from softbatch.scheduler.model.gguf_weights import Blocks, GgufWeights
from softbatch.scheduler.model.llama.decoder import products

# Where a block has its float16 numbers, and whether these are minimums.
_HALVES = {
    BlockKind.Q4_0: {0: False},
    BlockKind.Q4_1: {0: False, 2: True},
    BlockKind.Q5_0: {0: False},
    BlockKind.Q5_1: {0: False, 2: True},
    BlockKind.Q8_0: {0: False},
    BlockKind.Q4_K: {0: False, 2: True},
    BlockKind.Q5_K: {0: False, 2: True},
    BlockKind.Q6_K: {208: False},
    BlockKind.MXFP4: {},
}
# The largest number of a kind times the largest of its scales that are integers.
_LARGEST = {
    "Q4_0": 8,
    "Q4_1": 15,
    "Q5_0": 16,
    "Q5_1": 31,
    "Q8_0": 128,
    "Q4_K": 15 * 63,
    "Q5_K": 31 * 63,
    "Q6_K": 32 * 128,
}


def block_size(kind: BlockKind) -> tuple[int, int]:
    """Inputs and bytes of a block."""
    inputs, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind.value)]
    return inputs, size


def random_blocks(kind: BlockKind, rows: int, inputs: int, seed: int = 0, largest: float = 0.5) -> np.ndarray[Any, Any]:
    """uint8 [rows, bytes] with every bit pattern, but scales such that no value is much above `largest`."""
    rng = np.random.default_rng([seed, kind.value])
    size, count = block_size(kind)
    blocks = rng.integers(0, 256, (rows, inputs // size, count), dtype=np.uint8)
    if kind is BlockKind.MXFP4:  # whose scales are powers of two, and whose largest number is 6
        blocks[:, :, 0] = 127 + int(np.log2(largest / 6)) - rng.integers(0, 3, blocks.shape[:2])
    for at, is_minimum in _HALVES[kind].items():
        scales = largest / _LARGEST[kind.name] * rng.uniform(0.3, 1, blocks.shape[:2])
        if is_minimum:
            of_integers = 63 if kind.name.endswith("_K") else 1
            scales = largest / of_integers * rng.uniform(-1, 1, blocks.shape[:2])
        elif not kind.name.endswith("_K"):
            scales *= rng.choice([-1, 1], scales.shape)
        blocks[:, :, at : at + 2] = scales.astype(np.float16)[..., None].view(np.uint8)
    return blocks.reshape(rows, -1)


def exact(blocks: np.ndarray[Any, Any], kind: BlockKind) -> np.ndarray[Any, Any]:
    """float32 values by GGUF's own reference."""
    return np.asarray(gguf.dequantize(blocks, gguf.GGMLQuantizationType(kind.value)))


def nearest_blocks(weights: torch.Tensor, kind: BlockKind = BlockKind.Q8_0) -> np.ndarray[Any, Any]:
    """Of a kind that gguf can write: none of the K kinds."""
    return np.asarray(gguf.quantize(weights.float().numpy(), gguf.GGMLQuantizationType(kind.value)))


@torch.no_grad()
def in_blocks(model: Any, kind: BlockKind = BlockKind.Q8_0) -> GgufWeights:
    """The blocks nearest to a model's products, which then have the blocks' values."""
    found: dict[int, Blocks] = {}
    for linear in products(model):
        blocks = nearest_blocks(linear.weight, kind)
        found[id(linear.weight)] = Blocks(torch.from_numpy(blocks), kind)
        linear.weight.copy_(torch.from_numpy(exact(blocks, kind)))
    return GgufWeights(found)
