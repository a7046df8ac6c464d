"""The models that several tests share, each loaded once; and the marker of tests that need a GPU."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch is loaded; tests often share their cores

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is loaded: its kernels then run on the CPU

import pytest
from transformers import AutoTokenizer

from softbatch.scheduler.model.cpu.build import build as build_kernels
from softbatch.scheduler.model.source import EMBEDDED_ALIAS, ModelError, resolve
from tests.support.bucket_server import BucketServer, running_bucket_server, wanted_kind
from tests.support.faulty_proxy import FaultyProxy, running_proxy
from tests.support.models import TINY_CONFIGS, Reference, load_reference, save_tiny, save_tiny_compressible


@pytest.fixture(scope="session")
def smollm2() -> Reference:
    return load_reference(resolve(EMBEDDED_ALIAS).path)


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Directories of tiny random models with the embedded model's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(resolve(EMBEDDED_ALIAS).path)
    return {
        name: save_tiny(config, tokenizer, tmp_path_factory.mktemp("models") / name)
        for name, config in TINY_CONFIGS.items()
    }


@pytest.fixture(scope="session")
def tiny_compressible(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_compressible(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def bucket_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BucketServer]:
    """One for all tests of a process; each takes a prefix of its own."""
    with running_bucket_server(wanted_kind(), tmp_path_factory.mktemp("bucket-server")) as server:
        yield server


@pytest.fixture(scope="session")
def locking_server(bucket_server: BucketServer) -> BucketServer:
    """One that can keep compression jobs."""
    if not bucket_server.offers.replace:
        pytest.skip("it offers no conditional writes (If-Match), so it keeps no jobs")
    return bucket_server


@pytest.fixture
def proxy(bucket_server: BucketServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """Stores that are opened behind it go through it."""
    with running_proxy(bucket_server.endpoint) as found:
        monkeypatch.setenv("AWS_ENDPOINT_URL", found.endpoint)
        yield found


@pytest.fixture(scope="session", params=sorted(TINY_CONFIGS))
def tiny(request: pytest.FixtureRequest, tiny_models: dict[str, str]) -> Reference:
    """Each tiny model in turn."""
    return load_reference(tiny_models[request.param])


def pytest_sessionstart(session: pytest.Session) -> None:
    """What several processes of one run share on disk is made before they start: the kernels, the embedded model."""
    if session.config.getoption("numprocesses", None):  # only pytest-xdist's own process has it set
        build_kernels()
        with contextlib.suppress(ModelError):  # the tests that need it tell
            resolve(EMBEDDED_ALIAS)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked gpu need a CUDA device, those marked checkpoint what `make models` fetches. Of two processes the
    second begins with those marked long, and so has none left when the first has done all that share servers."""
    long = [item for item in items if item.get_closest_marker("long") is not None]
    others = [item for item in items if item.get_closest_marker("long") is None]
    middle = len(items) // 2
    items[:] = [*others[:middle], *long, *others[middle:]]
    if not os.environ.get("SOFTBATCH_TEST_MODELS"):
        for item in items:
            if item.get_closest_marker("checkpoint") is not None:
                item.add_marker(pytest.mark.skip(reason="real checkpoints are for make test-models"))
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(pytest.mark.skip(reason="no CUDA device here"))
