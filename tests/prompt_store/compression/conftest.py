"""The tiny model that most tests of compression use."""

from __future__ import annotations

import pytest

from tests.support.models import Reference, load_reference


@pytest.fixture(scope="session")
def llama(tiny_compressible: str) -> Reference:
    return load_reference(tiny_compressible)
