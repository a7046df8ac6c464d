"""The servers that the end-to-end tests share, and a tiny model with a long context for them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from softbatch.prompt_store.manifest import ModelSpec
from softbatch.scheduler.model.loader import spec_of
from tests.support.models import Reference, load_reference
from tests.support.servers import Server, Site, environment, running_server

StartServer = Callable[..., Server]
LONGEST = 16384


@pytest.fixture
def start_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartServer]:
    """`start_server(*flags, env=None, store=None)`: a server of the test's own, ready, and killed at its end."""
    with contextlib.ExitStack() as stack:

        def start(*flags: str, env: dict[str, str] | None = None, store: Path | None = None) -> Server:
            directory = tmp_path_factory.mktemp("server")
            return stack.enter_context(running_server(directory, *flags, env=env, store=store))

        yield start


@contextlib.contextmanager
def running_site(directories: pytest.TempPathFactory, *flags: str, store: Path | None = None) -> Iterator[Site]:
    """A place for servers with these flags, which all end with it."""
    with contextlib.ExitStack() as stack:

        def start(**options: Any) -> Server:
            directory = directories.mktemp("server")
            return stack.enter_context(running_server(directory, *flags, store=store, **options))

        yield Site(start)


@pytest.fixture(scope="session")
def tiny_llama(tiny_models: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """The tiny model, with a context so long that requests run for as long as a test wants."""
    path = tmp_path_factory.mktemp("models") / "tiny-llama"
    shutil.copytree(tiny_models["llama"], path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"max_position_embeddings": LONGEST}))
    return load_reference(str(path))


@pytest.fixture(scope="session")
def tiny_flags(tiny_llama: Reference) -> tuple[str, ...]:
    """Flags of a server on the tiny model with room for everything; later flags override them."""
    return ("--model", tiny_llama.path, "--dtype", "float32", "--kv-cache-gib", "0.03")


@pytest.fixture(scope="session")
def tiny_spec(tiny_llama: Reference) -> ModelSpec:
    return spec_of(Path(tiny_llama.path).name, tiny_llama.model, tiny_llama.tokenizer)


@pytest.fixture(scope="session")
def tiny_server(tiny_flags: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Sequences of up to 512 tokens; soft prompts of up to a mebibyte."""
    flags = (*tiny_flags, "--max-model-len", "512", "--max-prompt-mib", "1")
    with running_server(tmp_path_factory.mktemp("tiny-server"), *flags) as server:
        yield server


@pytest.fixture(scope="session")
def four_slots(tiny_flags: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Sequences as long as the model's window: what is asked for runs until somebody ends it."""
    flags = ("--max-batch-size", "4", "--vllm-metric-names")
    with running_server(tmp_path_factory.mktemp("four-slots"), *tiny_flags, *flags) as server:
        yield server


@pytest.fixture(scope="session")
def two_slots(tiny_flags: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """And four places to wait."""
    with running_site(tmp_path_factory, *tiny_flags, "--max-batch-size", "2", "--max-queue-size", "4") as site:
        yield site


@pytest.fixture(scope="session")
def async_site(tiny_flags: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """It launches a step before it knows what came of the last one; told to stop, it has two seconds."""
    flags = ("--async-scheduling", "on", "--max-batch-size", "4", "--drain-timeout", "2")
    with running_site(tmp_path_factory, *tiny_flags, *flags) as site:
        yield site


@pytest.fixture(scope="session")
def site_with_keys(tiny_flags: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """All servers of it have one store, and take as long as they need to stop."""
    keys = ("--api-key", "one", "--api-key", "two", "--admin-key", "root")
    limits = ("--max-batch-size", "8", "--max-batch-file-bytes", "100000", "--max-batch-lines", "100")
    store = tmp_path_factory.mktemp("site") / "prompts"
    with running_site(tmp_path_factory, *tiny_flags, *keys, *limits, "--drain-timeout", "3600", store=store) as site:
        yield site


@pytest.fixture
def untouched_engine(tiny_server: Server) -> Iterator[None]:
    """Afterwards the shared server answers as before, nothing was restarted, nothing registered, nothing is held."""
    engine, answer = tiny_server.engine().pid, tiny_server.complete("Is the sea", 4)
    yield
    assert tiny_server.complete("Is the sea", 4) == answer
    assert tiny_server.engine().pid == engine
    assert tiny_server.metric("engine_restarts_total") == 0
    assert tiny_server.http.get("/v1/soft_prompts").json()["data"] == [], "something was registered"
    tiny_server.wait_empty()


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def smollm2_server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The embedded model with so little room (13 blocks of 16 tokens) that prefills are cut and sequences preempted."""
    flags = ("--dtype", "float32", "--kv-cache-gib", f"{13.5 * BLOCK_BYTES / 2**30:.6f}", "--max-batch-size", "12")
    limits = ("--max-batch-tokens", "24", "--max-model-len", "160", "--device", request.param)
    with running_server(tmp_path_factory.mktemp("smollm2-server"), *flags, *limits) as server:
        yield server


@pytest.fixture
def no_settings(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No setting comes from the environment of whoever runs the tests."""
    for name in set(os.environ) - set(environment()):
        monkeypatch.delenv(name)
    # Should a wrong flag be let through, the server that then starts must end by itself.
    monkeypatch.setenv("SOFTBATCH_MODEL", "/nowhere/model")
    return monkeypatch


# Of the embedded model in float32: keys and values, layers, heads, head_dim, tokens, bytes.
BLOCK_BYTES = 2 * 30 * 3 * 64 * 16 * 4
