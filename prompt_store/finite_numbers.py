"""Whether the numbers of a safetensors file are finite, told by their bits: numpy knows no bfloat16."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

# By safetensors' name of a dtype: a number's bits, and those that are all set if it is not finite.
_EXPONENTS = {"F32": ("<u4", 0x7F80_0000), "F16": ("<u2", 0x7C00), "BF16": ("<u2", 0x7F80)}
_NUMBERS_AT_ONCE = 1 << 18


def first_non_finite(path: Path, name: str, shape: Sequence[int]) -> list[int] | None:
    """Where the first NaN or infinite number of a tensor is, or None. The file's header has been checked before."""
    import numpy as np  # here, as whoever lists files needs none

    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        tensor = json.loads(file.read(header_bytes))[name]
        kind, exponent = _EXPONENTS[tensor["dtype"]]
        begin, end = tensor["data_offsets"]
        file.seek(8 + header_bytes + begin)
        size = np.dtype(kind).itemsize
        for first in range(0, (end - begin) // size, _NUMBERS_AT_ONCE):
            count = min(_NUMBERS_AT_ONCE, (end - begin) // size - first)
            bits = np.frombuffer(file.read(count * size), kind)
            found = (bits & exponent) == exponent
            if found.any():
                return [int(i) for i in np.unravel_index(first + int(found.argmax()), tuple(shape))]
    return None
