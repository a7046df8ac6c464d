"""Compressions over HTTP: one job from its request to a soft prompt that answers, past a kill -9 of the server."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from softbatch.prompt_store.compression.frozen.frozen_model import Decoder
from softbatch.prompt_store.compression.frozen.greedy import greedy
from softbatch.prompt_store.compression.frozen.prefix import Prefix
from softbatch.prompt_store.compression.frozen.rendering import Renderer
from softbatch.prompt_store.soft_prompt_file import load
from softbatch.server.cli.main import main
from softbatch.server.compressions.job_places import MAX_QUEUED
from softbatch.server.compressions.job_queue import MAX_ATTEMPTS
from tests.server.compressions.conftest import CONTEXT, VIRTUAL_TOKENS, model_flags
from tests.support.models import load_reference
from tests.support.servers import Server, error_of, events_of, running_server, wait_for

ROUTE = "/v1/compressions"


class Site:
    """One store and the server on it, which tests may replace."""

    def __init__(self, start: Callable[[], Server]) -> None:
        self.start = start
        self.server = start()


@pytest.fixture(scope="module")
def site(tiny_path: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    store = tmp_path_factory.mktemp("http") / "store"
    # Sequences shorter than what a compression keeps room for in the model's own window, which is larger.
    limits = ("--kv-cache-gib", "0.03", "--max-prompt-mib", "2", "--max-model-len", "400")
    flags = ("--model", tiny_path, "--dtype", "float32", *limits)
    with contextlib.ExitStack() as stack:

        def start() -> Server:
            directory = tmp_path_factory.mktemp("server")
            return stack.enter_context(running_server(directory, *flags, store=store))

        yield Site(start)


def job_request(name: str, **fields: Any) -> dict[str, Any]:
    return {"name": name, "context": CONTEXT, "virtual_tokens": VIRTUAL_TOKENS, "steps": 2} | fields


def job(server: Server, job_id: str) -> dict[str, Any]:
    reply = server.http.get(f"{ROUTE}/{job_id}")
    assert reply.status_code == 200, reply.text
    found: dict[str, Any] = reply.json()
    return found


def create(server: Server, name: str, **fields: Any) -> str:
    reply = server.post(ROUTE, job_request(name, **fields))
    assert reply.status_code == 202, reply.text
    created = reply.json()
    assert reply.headers["location"] == f"{ROUTE}/{created['id']}"
    assert (created["object"], created["status"], created["name"]) == ("compression.job", "queued", name)
    job_id: str = created["id"]
    return job_id


def workers(server: Server) -> list[psutil.Process]:
    children = psutil.Process(server.process.pid).children()
    return [child for child in children if "softbatch.server.compressions.worker" in child.cmdline()]


def wait_phase(server: Server, job_id: str, phase: str) -> None:
    """Until the job has come to it, or is further already."""
    before = {"loading": set[str](), "gold": {"loading", "self_study"}}[phase]

    def has_come() -> bool:
        found = job(server, job_id)
        assert found["status"] in ("queued", "running"), found
        return bool(found["progress"]) and found["progress"]["phase"] not in before

    wait_for(has_come, f"the job did not come to {phase}")


def test_from_request_to_answers(site: Site, tiny_path: str, tmp_path: Path) -> None:
    server = site.server
    assert server.http.get(ROUTE).json() == {"object": "list", "data": []}
    questions = [{"input": "When does it open?", "output": "At seven."}, {"input": "Who pays?", "accept": ["ships"]}]
    first = create(server, "harbour", questions=questions, seed=3, keep_text=True, recall=0, preview=True)
    wait_phase(server, first, "loading")
    check_queue(server, first)
    wait_phase(server, first, "gold")
    assert [worker.nice() for worker in workers(server)] == [19]
    assert server.metric("compression_jobs", status="running") == 1
    answer = server.complete("The sea", 4)  # served meanwhile
    orphan = workers(server)[0]
    server.kill()
    wait_for(lambda: not orphan.is_running() or orphan.status() == psutil.STATUS_ZOMBIE, "the worker lives on")

    server = site.server = site.start()
    assert server.complete("The sea", 4) == answer
    worker = check_preview(server, first, tiny_path)
    with server.http.stream("GET", f"{ROUTE}/{first}/events") as reply:
        worker.resume()
        assert reply.headers["content-type"].startswith("text/event-stream")
        events = [json.loads(event) for event in events_of(reply.iter_lines())]
    assert {event["id"] for event in events} == {first}
    phases = {event["progress"]["phase"] for event in events if event["progress"]}
    assert "training" in phases
    assert "self_study" not in phases  # done before the kill, and not again
    assert [event["status"] in ("queued", "running") for event in events] == [True] * (len(events) - 1) + [False]
    done = events[-1]
    assert done == job(server, first)
    assert (done["status"], done["soft_prompt"], done["error"]) == ("succeeded", "harbour", None)
    assert done["preview"] is None
    assert done["created_at"] <= done["started_at"] <= done["finished_at"]
    assert {"kl", "kl_closed", "top1_agreement", "compression_ratio", "seconds"} <= set(done["fidelity"])

    found = server.http.get("/v1/soft_prompts/harbour").json()
    assert (found["recall"], found["preview"], found["compression"]) == (0, False, None)
    shown = found["manifest"]
    assert shown["fidelity"]["right_answers"]["soft_prompt"]["questions"] == 1
    assert shown["fidelity"]["kl"] == done["fidelity"]["kl"]
    assert shown["training"]["seed"] == 3
    page = server.http.get(f"{ROUTE}/{first}/report")
    assert page.status_code == 200
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "<svg" in page.text
    directory = server.store / ".compressions" / first
    assert {path.name for path in directory.iterdir()} == {"job.json", "lock", "report"}
    refused = server.post(f"{ROUTE}/{first}/cancel", None)
    assert (refused.status_code, error_of(refused)["code"]) == (409, "already_finished")
    taken = server.post(ROUTE, job_request("harbour"))
    assert (taken.status_code, error_of(taken)["code"]) == (409, "name_taken")

    check_student(server, tiny_path)
    check_cli_against_server(server, tiny_path, tmp_path)


def check_preview(server: Server, job_id: str, tiny_path: str) -> psutil.Process:
    """It answers before it is trained. The worker, which would go on, is stopped meanwhile."""
    wait_for(lambda: job(server, job_id)["preview"], "no preview is registered")
    worker = workers(server)[0]
    worker.suspend()
    found = job(server, job_id)
    assert (found["status"], found["preview"], found["soft_prompt"]) == ("running", "harbour", None)
    (listed,) = server.http.get("/v1/soft_prompts").json()["data"]
    assert (listed["name"], listed["preview"], listed["compression"]) == ("harbour", True, job_id)
    assert (listed["recall"], listed["kl_closed"] is not None) == (0, True)
    check_student(server, tiny_path)
    return worker


def check_queue(server: Server, running: str) -> None:
    """While one runs, others wait, up to a bound, each with a name of its own; queued ones can be cancelled."""
    taken = server.post(ROUTE, job_request("harbour"))
    assert (taken.status_code, error_of(taken)["code"], error_of(taken)["param"]) == (409, "name_taken", "name")
    queued = [create(server, f"queued-{index}") for index in range(MAX_QUEUED)]
    full = server.post(ROUTE, job_request("one-more"))
    assert (full.status_code, error_of(full)["code"]) == (429, "rate_limit_exceeded")
    assert int(full.headers["retry-after"]) > 0
    listed = [found["id"] for found in server.http.get(ROUTE).json()["data"]]
    assert listed == [*reversed(queued), running]
    assert server.metric("compression_jobs", status="queued") == MAX_QUEUED
    for job_id in queued:
        cancelled = server.post(f"{ROUTE}/{job_id}/cancel", None)
        assert cancelled.status_code == 200, cancelled.text
        assert cancelled.json()["status"] == "cancelled"
    again = server.post(f"{ROUTE}/{queued[0]}/cancel", None)
    assert (again.status_code, again.json()["status"]) == (200, "cancelled")
    no_report = server.http.get(f"{ROUTE}/{queued[0]}/report")
    assert (no_report.status_code, error_of(no_report)["code"]) == (404, "no_report")


def check_student(server: Server, tiny_path: str) -> None:
    """Greedy answers over HTTP are those of the student whose file has the name, whoever had it before."""
    reference = load_reference(tiny_path)
    model = reference.model
    decoder = Decoder(model)
    prompt = load(server.store / "harbour.safetensors", 2 << 20)
    assert prompt.keys is not None
    assert prompt.values is not None
    renderer = Renderer(reference.tokenizer)
    questions = ["When does the office open?", "Who pays?", "What do red flags mean, and for whom?"]
    asked = [renderer.question(question) for question in questions]
    expected = greedy(decoder, Prefix(prompt.keys, prompt.values), asked, 12, renderer.stop_ids)
    assert len({tuple(answer) for answer in expected}) > 1
    for question, answer in zip(questions, expected, strict=True):
        body = {"model": "harbour", "messages": [{"role": "user", "content": question}], "temperature": 0}
        reply = server.post("/v1/chat/completions", body | {"max_tokens": 12})
        assert reply.status_code == 200, reply.text
        assert reply.json()["choices"][0]["message"]["content"] == renderer.text(answer)


def check_cli_against_server(server: Server, tiny_path: str, tmp_path: Path) -> None:
    """`softbatch compress --server` registers over HTTP and refuses early what the server would refuse."""
    context = tmp_path / "harbour.md"
    context.write_text(CONTEXT, encoding="utf-8")
    flags = ["--virtual-tokens", "4", "--steps", "1", "--kind", "embeddings", "--server", server.url]
    local = model_flags(tiny_path, tmp_path / "store")
    assert main(["compress", str(context), "--name", "harbour", *flags, *local]) == 2
    assert main(["compress", str(context), "--name", "remote", "--keep-text", *flags, *local]) == 0
    shown = server.http.get("/v1/soft_prompts/remote").json()
    assert (shown["kind"], shown["num_virtual_tokens"], shown["recall"]) == ("embeddings", 4, 2)
    assert not (tmp_path / "store" / "remote.safetensors").exists()
    asked = ["--input", "When?", "--candidate", "At seven.", "--candidate", "Never.", "--soft-prompt", "remote"]
    assert main(["score", *asked, "--server", server.url]) == 0


def test_cancel_while_it_runs(site: Site) -> None:
    server = site.server
    running = create(server, "unwanted", steps=100_000, preview=True)
    wait_for(lambda: job(server, running)["preview"], "no preview is registered")
    assert server.http.get("/v1/soft_prompts/unwanted").json()["preview"]
    worker = workers(server)[0]
    cancelled = server.post(f"{ROUTE}/{running}/cancel", None)
    assert cancelled.status_code == 200, cancelled.text
    assert (cancelled.json()["status"], cancelled.json()["preview"]) == ("cancelled", None)
    assert not worker.is_running()
    assert {path.name for path in (server.store / ".compressions" / running).iterdir()} == {"job.json", "lock"}
    assert server.http.get("/v1/soft_prompts/unwanted").status_code == 404
    with server.http.stream("GET", f"{ROUTE}/{running}/events") as reply:
        events = [json.loads(event) for event in events_of(reply.iter_lines())]
    assert [event["status"] for event in events] == ["cancelled"]


def test_a_worker_that_dies_fails_its_job_and_nothing_else(site: Site) -> None:
    server = site.server
    running = create(server, "doomed")
    worker = wait_for(lambda: workers(server), "no worker")[0]
    worker.kill()
    failed = wait_for(lambda: (found := job(server, running))["status"] == "failed" and found, "it did not fail")
    assert failed["error"]["code"] == "worker_died"
    assert "memory" in failed["error"]["message"]
    assert server.complete("The sea", 2)
    again = create(server, "doomed")  # the name is free
    assert server.post(f"{ROUTE}/{again}/cancel", None).status_code == 200


def test_another_server_takes_over_and_loses_nothing_silently(site: Site) -> None:
    """One server of a store runs its compressions. It is stopped in good order; what cannot go on then says so."""
    server, other = site.server, site.start()
    refused = other.post(ROUTE, job_request("elsewhere"))
    assert (refused.status_code, error_of(refused)["code"]) == (503, "compressions_elsewhere")

    jobs = [create(server, name) for name in ("tired", "forgotten", "unreadable", "other-model", "fine")]
    tired, forgotten, unreadable, other_model, fine = jobs
    wait_phase(server, tired, "loading")
    worker = workers(server)[0]
    root = server.store / ".compressions"
    edit(root / tired / "job.json", attempts=MAX_ATTEMPTS)
    (root / forgotten / "request.json").unlink()
    (root / unreadable / "job.json").write_text("{")
    edit(root / other_model / "job.json", fingerprint="0" * 64)
    unacknowledged = root / f"cmpr-{'0' * 24}"
    unacknowledged.mkdir()
    os.killpg(server.process.pid, signal.SIGTERM)  # as a service manager does: all of its processes at once
    assert server.wait_exit() == 0
    assert not worker.is_running()

    server = site.server = other
    wait_for(lambda: server.http.get(ROUTE).status_code == 200, "the other server did not take over")
    # It answers while it still looks through them.
    ended = (tired, forgotten, unreadable, other_model)
    wait_for(lambda: all(job(server, job_id)["error"] for job_id in ended), "a job is lost silently")
    codes = [job(server, job_id)["error"]["code"] for job_id in ended]
    assert codes == ["interrupted", "unreadable", "unreadable", "model_changed"]
    assert job(server, fine)["status"] in ("queued", "running")
    assert server.post(f"{ROUTE}/{fine}/cancel", None).status_code == 200
    assert not unacknowledged.exists()


def edit(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_bad_requests(site: Site) -> None:
    server = site.server
    cases: dict[str, tuple[dict[str, Any], int, str]] = {
        "empty context": ({"context": " \n"}, 400, "context"),
        "NUL in the context": ({"context": "a\0b"}, 400, "context"),
        "unknown objective": ({"objective": "mse"}, 400, "objective"),
        "unknown kind": ({"kind": "lora"}, 400, "kind"),
        "too many virtual tokens": ({"virtual_tokens": 400}, 400, "virtual_tokens"),
        "larger than the store takes": ({"virtual_tokens": 60_000}, 413, "virtual_tokens"),
        "alpha": ({"alpha": 2}, 400, "alpha"),
        "no minutes": ({"steps": None, "minutes": 0}, 400, "minutes"),
        "minutes and steps": ({"minutes": 1}, 400, "minutes"),
        "blank question": ({"questions": [{"input": "When?"}, {"input": " "}]}, 400, "questions.1.input"),
        "question without input": ({"questions": [{"output": "x"}]}, 400, "questions.0.input"),
        "blank accepted text": ({"questions": [{"input": "x", "accept": [" "]}]}, 400, "questions.0.accept"),
        "recall without a kept text": ({"recall": 2}, 400, "recall"),
        "no yes or no": ({"preview": "later"}, 400, "preview"),
        "too many passages": ({"keep_text": True, "recall": 17}, 400, "recall"),
        "invalid name": ({"name": "../up"}, 400, "name"),
        "name of the model": ({"name": "tiny-llama"}, 409, "name"),
        "unknown field": ({"virtual_token": 3}, 400, "virtual_token"),
        "seed": ({"seed": -1}, 400, "seed"),
        "answer tokens": ({"answer_tokens": 3}, 400, "answer_tokens"),
        "questions of the model": ({"model_questions": -1}, 400, "model_questions"),
        "no room in the window": ({"virtual_tokens": 1700}, 400, "virtual_tokens"),
    }
    for case, (fields, status, param) in cases.items():
        reply = server.post(ROUTE, job_request("refused") | fields)
        assert (reply.status_code, error_of(reply)["param"]) == (status, param), (case, reply.text)
    unknown = f"{ROUTE}/cmpr-{'0' * 24}"
    for reply in (
        server.http.get(unknown),
        server.http.get(f"{unknown}/events"),
        server.post(f"{unknown}/cancel", None),
    ):
        assert (reply.status_code, error_of(reply)["code"]) == (404, "compression_not_found")
    assert not any(found["name"] == "refused" for found in server.http.get(ROUTE).json()["data"])
