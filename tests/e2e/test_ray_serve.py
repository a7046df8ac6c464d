"""Replicas on a real Ray: a killed one is a pause for every kind of request. Skipped where Ray is not installed."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

import psutil
import pytest

from softbatch.prompt_store.manifest import ModelSpec
from softbatch.server.cli.main import main
from tests.support.mixed_requests import EMBEDDINGS, KEYS_AND_VALUES, answers_of, difference, is_error, mixed_requests
from tests.support.models import make_soft_prompt, save_prompt
from tests.support.servers import (
    PROJECT,
    READY_SECONDS,
    Server,
    check_refusal,
    environment,
    error_of,
    free_port,
    wait_for,
)

needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="needs softbatch[ray], which weighs 250 MB")


@pytest.fixture(scope="module")
def ray_server(
    tiny_flags: tuple[str, ...], tiny_spec: ModelSpec, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """Two replicas of the tiny model, and a soft prompt of each kind."""
    directory = tmp_path_factory.mktemp("ray-serve")
    port, log = free_port(), directory / "log"
    cluster = ("--replicas", "2", "--replica-cpus", "0.1", "--ingress-replicas", "1")
    command = [sys.executable, "-m", "softbatch", "ray-serve", *cluster, *tiny_flags, "--max-batch-size", "6"]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--port", str(port), "--prompt-store", str(directory / "prompts")],
            cwd=PROJECT,
            env=environment(PYTHONPATH=str(PROJECT)),
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    server = Server(process, port, log, directory / "prompts", directory)
    try:
        wait_for(server.is_ready_or_gone, "the replicas do not become ready", READY_SECONDS)
        assert process.poll() is None, log.read_text()[-4000:]
        for name, kind in ((EMBEDDINGS, "embeddings"), (KEYS_AND_VALUES, "kv")):
            prompt = make_soft_prompt(kind, 21, tiny_spec, scale=0.5)
            assert server.upload(name, save_prompt(prompt, directory, name)).status_code == 201
        yield server
    finally:
        process.terminate()
        try:
            process.wait(60)
        finally:
            for child in [*psutil.Process().children(recursive=True)]:
                if child.pid == process.pid:
                    child.kill()


def replicas_of(server: Server) -> list[psutil.Process]:
    """Ray's workers below the command, those that have an engine."""
    below = psutil.Process(server.process.pid).children(recursive=True)
    engines = [child for child in below if "softbatch.scheduler.engine.process" in " ".join(child.cmdline())]
    return [parent for engine in engines if (parent := engine.parent()) is not None]


@needs_ray
def test_a_killed_replica_is_a_pause_for_every_kind_of_request(ray_server: Server) -> None:
    requests = mixed_requests(22, 60)
    expected = asyncio.run(answers_of(ray_server, requests))
    assert not any(map(is_error, expected)), expected
    wait_for(lambda: len(replicas_of(ray_server)) == 2, "there are not two replicas")
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(lambda: asyncio.run(answers_of(ray_server, requests)))
        dying = replicas_of(ray_server)[0]
        wait_for(lambda: any(child.cpu_percent(0.05) > 5 for child in dying.children()), "nothing is computed")
        for process in (dying, *dying.children(recursive=True)):
            process.send_signal(signal.SIGKILL)
        answers = coming.result(timeout=240)
    for request, answer, right in zip(requests, answers, expected, strict=True):
        assert difference(answer, right, 1e-4) is None, (request, difference(answer, right, 1e-4))
    wait_for(lambda: "goes to another replica" in ray_server.log.read_text(), "no request was on the one that died")


@needs_ray
def test_routes_errors_and_names_are_those_of_one_server(ray_server: Server) -> None:
    listed = [card["id"] for card in ray_server.http.get("/v1/models").json()["data"]]
    assert {EMBEDDINGS, KEYS_AND_VALUES} <= set(listed)
    reply = ray_server.post("/v1/completions", {"prompt": "x", "temperatur": 1})
    assert (reply.status_code, error_of(reply)["param"]) == (400, "temperatur")
    assert len(reply.headers.get_list("x-request-id")) == 1
    assert ray_server.http.get("/health").status_code == 200
    assert ray_server.http.get("/v1/batches").status_code == 200
    assert ray_server.http.get("/v1/compressions").status_code == 200
    assert ray_server.http.get("/nowhere").status_code == 404


@needs_ray
def test_a_prompt_goes_where_its_beginning_was_computed(ray_server: Server) -> None:
    for number in range(6):
        found = []
        for end in ("", " and more", " and another end"):
            ask = {"prompt": f"Manual {number}, which nobody else has. " * 12 + end, "max_tokens": 1}
            usage = ray_server.post("/v1/completions", ask).json()["usage"]
            found.append(usage["prompt_tokens_details"]["cached_tokens"] > 0)
        assert found == [False, True, True]


def test_without_ray_one_line_says_what_is_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    check_refusal(main(["ray-serve"]), capsys.readouterr().err, ("pip install 'softbatch[ray]'",))


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (("--replicas", "0"), ("--replicas", "greater than or equal to 1")),
        (("--min-replicas", "2"), ("--min-replicas 2", "--max-replicas")),
        (("--min-replicas", "3", "--max-replicas", "2"), ("--min-replicas 3", "--max-replicas 2")),
        (("--target-first-token", "2"), ("--target-first-token 2.0", "--max-replicas")),
        (("--target-first-token", "0", "--max-replicas", "2"), ("--target-first-token", "greater than 0")),
        (("--router", "random"), ("--router", "'affinity'", "'random'")),
        (("--max-batch-size", "0"), ("--max-batch-size",)),
    ],
)
def test_wrong_flags_are_refused(
    flags: tuple[str, ...], parts: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    check_refusal(main(["ray-serve", *flags]), capsys.readouterr().err, parts)


@needs_ray
def test_models_of_one_name_are_refused() -> None:
    from softbatch.server.cluster.deployments import build

    with pytest.raises(ValueError, match=r"'smollm2-135m'.*served_model_name"):
        build({"replicas": 1, "models": [{"max_batch_size": 4}, {"max_batch_size": 8}]})
