"""The models that several tests share, each loaded once; and the marker of tests that need a GPU."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch is loaded; tests often share their cores

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is loaded: its kernels then run on the CPU

import pytest
from transformers import AutoTokenizer

from softbatch.scheduler.model.source import EMBEDDED_ALIAS, resolve
from tests.support.models import TINY_CONFIGS, Reference, load_reference, save_tiny


@pytest.fixture(scope="session")
def smollm2() -> Reference:
    return load_reference(resolve(EMBEDDED_ALIAS).path)


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Directories of tiny random models whose outputs vary: the weights are spread wider than at initialisation."""
    tokenizer = AutoTokenizer.from_pretrained(resolve(EMBEDDED_ALIAS).path)
    paths = {}
    for name in TINY_CONFIGS:
        path = tmp_path_factory.mktemp("models") / name
        save_tiny(name, path, tokenizer)
        paths[name] = str(path)
    return paths


@pytest.fixture(scope="session", params=sorted(TINY_CONFIGS))
def tiny(request: pytest.FixtureRequest, tiny_models: dict[str, str]) -> Reference:
    """Each tiny model in turn."""
    return load_reference(tiny_models[request.param])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked gpu need a CUDA device."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(pytest.mark.skip(reason="no CUDA device here"))
