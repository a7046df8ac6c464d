"""Where a GGUF file has its tensors. gguf's own reader takes seconds for a vocabulary, at every start."""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softbatch.scheduler.model.model_error import ModelError

if TYPE_CHECKING:  # most servers read no such file
    import numpy as np

# Bytes of the values of a field, by the numbers of their types; the rest are strings and arrays.
_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_UINT32, _STRING, _ARRAY = 4, 8, 9
_ALIGNMENT = 32  # unless the file says another


class _Header:
    """Reads one thing after another."""

    def __init__(self, data: memoryview) -> None:
        self._data = data
        self.at = 0

    def numbers(self, format_: str) -> tuple[int, ...]:
        found = struct.unpack_from(f"<{format_}", self._data, self.at)
        self.at += struct.calcsize(f"<{format_}")
        return found

    def number(self, format_: str) -> int:
        (found,) = self.numbers(format_)
        return found

    def text(self) -> str:
        size = self.number("Q")
        self.at += size
        return bytes(self._data[self.at - size : self.at]).decode("utf-8", "replace")

    def skip(self, kind: int) -> None:
        if kind == _STRING:
            size = self.number("Q")
            self.at += size
        elif kind == _ARRAY:
            of, count = self.numbers("IQ")
            if of in _BYTES:
                self.at += count * _BYTES[of]
            else:
                for _ in range(count):
                    self.skip(of)
        else:
            self.at += _BYTES[kind]


class GgufTensors:
    """The tensors of a file that was converted, and so was found to be whole."""

    def __init__(self, path: Path) -> None:
        """Raises ModelError for a file in another order of bytes, or of a version that nobody writes any more."""
        import numpy as np

        self._data = np.memmap(path, np.uint8, "c")  # torch takes no memory that must not be written
        header = _Header(self._data.data)
        _, version, num_tensors, num_fields = header.numbers("IIQQ")
        if version not in (2, 3):
            raise ModelError(f"the file is of version {version} of GGUF, or not little-endian, which is not supported")
        self.architecture, alignment = "", _ALIGNMENT
        for _ in range(num_fields):
            name, kind = header.text(), header.number("I")
            if name == "general.architecture" and kind == _STRING:
                self.architecture = header.text()
            elif name == "general.alignment" and kind == _UINT32:
                alignment = header.number("I")
            else:
                header.skip(kind)
        self._found: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for _ in range(num_tensors):
            name = header.text()
            shape = header.numbers(f"{header.number('I')}Q")
            self._found[name] = (shape, header.number("I"), header.number("Q"))
        self._start = -(-header.at // alignment) * alignment

    @property
    def names(self) -> set[str]:
        return set(self._found)

    def shape(self, name: str) -> tuple[int, ...]:
        """Its last number is that of a row's inputs."""
        return self._found[name][0][::-1]

    def kinds(self) -> dict[str, tuple[str, int]]:
        """The name and the number of each tensor's kind, of tensors with several rows."""
        from gguf import GGMLQuantizationType

        return {
            name: (GGMLQuantizationType(number).name, number)
            for name, (shape, number, _) in self._found.items()
            if math.prod(shape[1:]) > 1
        }

    def rows(self, name: str) -> tuple[str, int, np.ndarray[Any, Any]] | None:
        """The name and the number of a tensor's kind, and its rows as bytes. None if there is no such tensor."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        if name not in self._found:
            return None
        shape, number, offset = self._found[name]
        kind = GGMLQuantizationType(number)
        inputs, size = GGML_QUANT_SIZES[kind]
        count = math.prod(shape) // inputs * size
        first = self._start + offset
        return kind.name, number, self._data[first : first + count].reshape(math.prod(shape[1:]), -1)
