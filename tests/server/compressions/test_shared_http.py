"""Two servers on one bucket: names of one are served by the other, and so is the rest of a compression."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterator

import pytest

from softbatch.prompt_store.stores.bucket import Bucket
from softbatch.server.compressions.shared_record import SharedRecords
from tests.server.compressions.conftest import VIRTUAL_TOKENS
from tests.server.compressions.test_http import ROUTE, create, job, workers
from tests.support.bucket_server import BucketServer
from tests.support.servers import Server, error_of, events_of, running_server, wait_for


@pytest.fixture(scope="module")
def url(locking_server: BucketServer) -> str:
    return locking_server.new_url()


@pytest.fixture(scope="module")
def pair(
    locking_server: BucketServer, url: str, tiny_path: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Server, Server]]:
    limits = ("--kv-cache-gib", "0.03", "--max-prompt-mib", "2", "--max-model-len", "400")
    place = ("--prompt-store", url, "--prompt-cache-gib", "0.1")
    with contextlib.ExitStack() as stack:

        def start() -> Server:
            directory = tmp_path_factory.mktemp("server")
            flags = ("--model", tiny_path, "--dtype", "float32", *limits, *place, "--prompt-cache", str(directory))
            return stack.enter_context(running_server(directory, *flags, env=locking_server.environment))

        yield start(), start()


def test_a_compression_killed_with_its_server_ends_on_the_other(pair: tuple[Server, Server], url: str) -> None:
    one, other = pair
    records = SharedRecords(Bucket(url))
    job_id = create(one, "harbour", steps=60, seed=3, keep_text=True, recall=0, preview=True)

    def has_answers_and_a_preview() -> bool:
        seen = records.read(job_id)
        assert seen is not None
        assert seen.shared.record.status in ("queued", "running"), seen
        return "work/held_out.jsonl" in seen.shared.files and seen.shared.record.preview is not None

    wait_for(lambda: workers(one) or workers(other), "nobody takes the job")
    first, second = (one, other) if workers(one) else (other, one)
    assert not workers(second), "one at a time"
    wait_for(has_answers_and_a_preview, "what it does is not saved")
    assert job(second, job_id)["progress"], "the other server does not see it"
    first.kill()
    asked = {"model": "harbour", "prompt": "The sea", "max_tokens": 4}
    wait_for(lambda: second.post("/v1/completions", asked).status_code == 200, "the other server has no preview")

    with second.http.stream("GET", f"{ROUTE}/{job_id}/events") as reply:
        events = [json.loads(event) for event in events_of(reply.iter_lines())]
    assert (events[-1]["status"], events[-1]["preview"]) == ("succeeded", None), events[-1]
    told = [event["progress"]["phase"] for event in events if event["progress"]]
    # The first that are told may be the last that the other server has said.
    phases = set(itertools.dropwhile(lambda phase: phase == "self_study", told))
    assert "training" in phases
    assert "self_study" not in phases, "done before the kill, and not again"
    log = second.log.read_text()
    assert "goes on from what another server did" in log
    assert "attempt 2" in log
    assert second.http.get(f"{ROUTE}/{job_id}/report").status_code == 200
    found = second.http.get("/v1/soft_prompts/harbour").json()
    assert not found["preview"]
    assert (found["num_virtual_tokens"], found["recall"]) == (VIRTUAL_TOKENS, 0)
    reply = second.post("/v1/completions", asked)
    assert reply.status_code == 200, reply.text

    queued = create(second, "cancelled", steps=5000)
    wait_for(lambda: workers(second), "it does not begin")
    reply = second.http.post(f"{ROUTE}/{queued}/cancel")
    assert reply.json()["status"] == "cancelled", reply.text
    assert second.http.delete("/v1/soft_prompts/harbour").status_code == 200
    reply = second.post("/v1/completions", asked)
    assert error_of(reply)["code"] == "model_not_found"
