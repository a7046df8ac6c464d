"""Servers that are killed, and what the next one on the same store finds."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import psutil
import pytest

from softbatch.prompt_store.manifest import ModelSpec
from tests.e2e.test_batches_http import COMPLETIONS, ended, lines_of, requests, start
from tests.e2e.test_soft_prompts_http import QUESTION, greedy
from tests.support.background import COMPLETE, body, in_background
from tests.support.models import Reference, make_soft_prompt, save_prompt
from tests.support.openai_requests import client_of
from tests.support.servers import Site, wait_for

ROOT = {"Authorization": "Bearer root"}


def test_a_killed_server_leaves_only_whole_prompts(
    site_with_keys: Site, tiny_llama: Reference, tiny_spec: ModelSpec, tmp_path: Path
) -> None:
    """kill -9 of all its processes in the middle of uploads, then a new server on the same directory."""
    server, kinds = site_with_keys.server, ("embeddings", "kv", "embeddings")
    prompts = [make_soft_prompt(kind, 300, tiny_spec, seed=seed, scale=0.5) for seed, kind in enumerate(kinds)]
    files = [save_prompt(prompt, tmp_path, f"f{seed}") for seed, prompt in enumerate(prompts)]
    acknowledged: list[str] = []

    def upload_until_it_dies(worker: int) -> None:
        with httpx.Client(base_url=server.url, headers=ROOT, timeout=60) as client:
            for number in range(100_000):
                name, file = f"w{worker}-{number}", files[number % len(files)]
                try:
                    parts = [("file", (file.name, file.read_bytes()))]
                    reply = client.post("/v1/soft_prompts", data={"name": name}, files=parts)
                except httpx.HTTPError:
                    return
                assert reply.status_code == 201, reply.text
                acknowledged.append(name)

    with ThreadPoolExecutor(4) as pool:
        workers = [pool.submit(upload_until_it_dies, worker) for worker in range(4)]
        wait_for(lambda: len(acknowledged) >= 12 or any(w.done() for w in workers), "no upload came through")
        server.kill()
        for worker in workers:
            worker.result()

    server = site_with_keys.start()
    listing = server.http.get("/v1/soft_prompts").json()
    assert "broken" not in listing
    listed = [prompt["name"] for prompt in listing["data"]]
    assert set(acknowledged) <= set(listed)
    assert not list(server.store.glob(".add-*")), "remains of unfinished uploads"
    assert len(list(server.store.glob(".leases-*"))) == 1, "leases of the dead server"
    assert len({prompt["sha256"] for prompt in listing["data"]}) == len(files)
    expected = {file.read_bytes(): greedy(tiny_llama, 6, prompt) for file, prompt in zip(files, prompts, strict=True)}
    for name in listed:
        content = server.http.get(f"/v1/soft_prompts/{name}/content", headers=ROOT).content
        assert server.complete(QUESTION, 6, soft_prompt=name) == expected[content]


def test_a_killed_server_goes_on_with_batches_and_keys_see_their_own(site_with_keys: Site) -> None:
    server = site_with_keys.server
    one, two, root = (client_of(server, api_key=key) for key in ("one", "two", "root"))
    bodies = [{"prompt": f"{i} ships", "max_tokens": 40, "temperature": 0} for i in range(80)]
    alone = server.http.post(COMPLETIONS, json=bodies[7]).json()["choices"][0]["text"]
    batch = start(one, COMPLETIONS, requests(COMPLETIONS, *bodies))
    with pytest.raises(openai.NotFoundError):
        two.batches.retrieve(batch.id)
    with pytest.raises(openai.NotFoundError):
        two.files.content(batch.input_file_id)
    assert ([each.id for each in two.batches.list()], [each.id for each in root.batches.list()]) == ([], [batch.id])
    with pytest.raises(openai.ConflictError) as used:
        one.files.delete(batch.input_file_id)
    assert used.value.code == "file_in_use"
    with pytest.raises(openai.APIStatusError) as large:
        one.files.create(file=("big.jsonl", b"x" * 100_001), purpose="batch")
    assert large.value.status_code == 413

    def completed() -> int:
        counts = one.batches.retrieve(batch.id).request_counts
        return counts.completed if counts else 0

    wait_for(lambda: completed() >= 10, "no line is answered")
    server.kill()
    again = site_with_keys.start()
    one = client_of(again, api_key="one")
    found = ended(one, batch.id)
    assert found.status == "completed"
    output = lines_of(one, found.output_file_id)
    assert list(output) == [f"q{i}" for i in range(80)]
    assert output["q7"]["response"]["body"]["choices"][0]["text"] == alone
    assert 0 < again.metric("batch_lines_total", outcome="completed") < 75
    assert again.metric("batches_unfinished") == again.metric("batch_lines_left") == 0
    # What runs in the background counts to no latency that somebody has seen.
    assert again.metric("time_to_first_token_seconds_count") == 0

    long = requests(COMPLETIONS, *[{"prompt": "a", "max_tokens": 4000, "ignore_eos": True}] * 90)
    batch = start(one, COMPLETIONS, long)
    wait_for(lambda: again.metric("requests_running") == 2, "the lines do not run")
    assert again.complete("Is the sea", 4)
    assert one.batches.cancel(batch.id).status in ("cancelling", "cancelled")
    assert ended(one, batch.id).status == "cancelled"
    again.wait_empty()


def test_a_front_end_that_is_killed_leaves_nothing_behind_at_the_next_start(site_with_keys: Site) -> None:
    """Not even an engine that hangs at that moment."""
    server = site_with_keys.server
    engine = server.engine()
    busy = in_background(server, COMPLETE, body(15000, stream=True))
    wait_for(lambda: busy.events, "the stream does not begin")
    engine.send_signal(signal.SIGSTOP)
    os.kill(server.process.pid, signal.SIGKILL)
    server.process.wait(timeout=60)
    psutil.wait_procs([engine], timeout=60)
    assert not engine.is_running(), "an engine without a front end"
    assert busy.result().broken is not None or "[DONE]" not in busy.events
    left = [*server.temp.glob("softbatch-*"), *server.store.glob(".leases-*")]
    assert len(left) == 2
    site_with_keys.start(env={"TMPDIR": str(server.temp)})
    assert not any(path.exists() for path in left)
