"""Copies between host and device: one per step and direction, without waiting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch

_ALIGNMENT = 16  # bytes; kernels are compiled for pointers with this alignment


@dataclass(frozen=True)
class Place:
    """The place of an array in the common buffer."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype


def to_device(arrays: Mapping[str, np.ndarray], device: torch.device) -> dict[str, torch.Tensor]:
    """The arrays as tensors on the device. On the CPU they share the arrays' memory."""
    if device.type == "cpu":
        return {name: torch.from_numpy(array) for name, array in arrays.items()}
    host, places = pack(arrays, pin=device.type == "cuda")
    return unpack(host.to(device, non_blocking=True), places)


class ToHost:
    """Numbers that are being copied from the device, all in one copy. Only `read` waits, and only for work that was
    queued before the copy."""

    def __init__(self, parts: Sequence[torch.Tensor]) -> None:
        self._sizes = [part.numel() for part in parts]
        numbers = torch.cat([part.double().flatten() for part in parts])
        self._arrived: torch.cuda.Event | None = None
        if numbers.device.type == "cuda":
            pinned = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            numbers = pinned.copy_(numbers, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()
        self._numbers = numbers

    def read(self) -> list[list[float]]:
        """The numbers of each part."""
        if self._arrived is not None:
            self._arrived.synchronize()
        numbers = iter(self._numbers.tolist())
        return [list(islice(numbers, size)) for size in self._sizes]


def small_tensor(values: Sequence[int] | Sequence[float], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """A few numbers on the device. torch.tensor(…, device=…) would wait for all queued work."""
    tensor = torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")
    return tensor.to(device, non_blocking=True)


def pack(arrays: Mapping[str, np.ndarray], *, pin: bool) -> tuple[torch.Tensor, dict[str, Place]]:
    """All arrays in one buffer of bytes. torch reuses pinned memory only after copies from it are done."""
    places, size = {}, 0
    for name, array in arrays.items():
        places[name] = Place(size, array.shape, torch.from_numpy(array).dtype)
        size += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
    host = torch.empty(size, dtype=torch.uint8, pin_memory=pin)
    target = host.numpy()
    for name, array in arrays.items():
        start = places[name].offset
        target[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return host, places


def unpack(buffer: torch.Tensor, places: Mapping[str, Place]) -> dict[str, torch.Tensor]:
    """Views of the buffer, as the arrays were."""
    found = {}
    for name, place in places.items():
        size = place.dtype.itemsize
        for length in place.shape:
            size *= length
        found[name] = buffer[place.offset : place.offset + size].view(place.dtype).view(place.shape)
    return found
