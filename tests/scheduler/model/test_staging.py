"""Arrays survive the way through one buffer."""

from __future__ import annotations

import numpy as np
import torch

from softbatch.scheduler.model.staging import ToHost, pack, small_tensor, to_device, unpack

ARRAYS = {
    "a": np.arange(5, dtype=np.int64),
    "none": np.zeros((0, 4), dtype=np.int32),
    "table": np.arange(12, dtype=np.int32).reshape(3, 4)[:, ::2],
    "b": np.array([1.5, -2.0], dtype=np.float32),
}


def test_packing_and_unpacking_gives_the_arrays_again_aligned() -> None:
    buffer, places = pack(ARRAYS, pin=False)
    assert all(place.offset % 16 == 0 for place in places.values())
    for name, tensor in unpack(buffer, places).items():
        assert torch.equal(tensor, torch.from_numpy(ARRAYS[name].copy())), name
        assert tensor.numpy().dtype == ARRAYS[name].dtype


def test_on_the_cpu_nothing_is_copied() -> None:
    tensors = to_device(ARRAYS, torch.device("cpu"))
    tensors["a"][0] = 99
    assert ARRAYS["a"][0] == 99
    ARRAYS["a"][0] = 0
    assert small_tensor([1, 2], torch.device("cpu"), torch.int64).tolist() == [1, 2]


def test_numbers_come_back_part_by_part() -> None:
    parts = [torch.tensor([3, 2**40]), torch.zeros(0), torch.tensor([[True, False]]), torch.tensor([0.1])]
    assert ToHost(parts).read() == [[3.0, 2.0**40], [], [1.0, 0.0], [float(torch.tensor(0.1))]]
