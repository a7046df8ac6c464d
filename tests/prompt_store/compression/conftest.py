"""The tiny model that most tests of compression use."""

from __future__ import annotations

import pytest

from tests.support.models import Reference, load_reference


@pytest.fixture(scope="module")
def llama(tiny_models: dict[str, str]) -> Reference:
    return load_reference(tiny_models["llama"])
