"""The formats of weights and of KV caches, by the numbers that cross to C++; csrc/formats.h has the same."""

from __future__ import annotations

from enum import Enum
from typing import Self


class _Format(Enum):
    """A member's value is its number in C++, its label what users read and write."""

    @property
    def label(self) -> str:
        return self.name.lower().replace("_", " ")

    def __str__(self) -> str:
        return self.label

    @classmethod
    def named(cls, label: str) -> Self:
        """Raises ValueError for a label that none has."""
        for member in cls:
            if member.label == label:
                return member
        raise ValueError(f"it must be {' or '.join(member.label for member in cls)}, not {label}")


class WeightFormat(_Format):
    """How the decoder's weights lie in memory. No number is also a KV format's: a mix-up is refused."""

    FLOAT32 = 1
    BFLOAT16 = 2
    BFLOAT16_IN_12_BITS = 3
    INT8 = 4
    GGUF_BLOCKS = 5


class KvFormat(_Format):
    """How keys and values lie in the cache: in the model's dtype, or packed by the kernels.

    INT8 has 8 bits a number, K6V4 has 6 bits for keys and 4 for values.
    """

    PLAIN = 101
    INT8 = 102
    K6V4 = 103


class BlockKind(Enum):
    """The kinds of GGUF's blocks that the kernels multiply, by their names and numbers in GGUF."""

    Q4_0 = 2
    Q4_1 = 3
    Q5_0 = 6
    Q5_1 = 7
    Q8_0 = 8
    Q4_K = 12
    Q5_K = 13
    Q6_K = 14
    MXFP4 = 39

    def __str__(self) -> str:
        return self.name
