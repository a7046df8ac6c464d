"""The tiny model that most tests of compression use, and what computes the real one quickly."""

from __future__ import annotations

import pytest

from softbatch.prompt_store.compression.frozen.frozen_model import Kernels
from softbatch.scheduler.model.cpu.build import build as build_kernels
from softbatch.server.compressions.session import CPU_KERNELS
from tests.support.models import Reference, load_reference


@pytest.fixture(scope="session")
def llama(tiny_compressible: str) -> Reference:
    return load_reference(tiny_compressible)


@pytest.fixture(scope="session")
def kernels() -> Kernels:
    """Those that `softbatch compress` takes here: with them the real model computes in half the time."""
    return CPU_KERNELS if build_kernels() else Kernels()
