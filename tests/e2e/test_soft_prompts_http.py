"""The life of a soft prompt over HTTP: trained by PEFT or made here, uploaded, used, evicted, downloaded, deleted."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from softbatch.prompt_store.manifest import ModelSpec
from softbatch.prompt_store.soft_prompt_file import SoftPrompt
from softbatch.server.requests.leases import lease_directory
from tests.e2e.conftest import StartServer
from tests.support.models import Reference, make_soft_prompt, save_prompt
from tests.support.servers import Server, error_of, wait_for

# Longer than two blocks, so that a prefix cache that told soft prompts not apart would show.
QUESTION = (
    "A ship has come in this morning with bread and letters on board, and nobody is here to meet it. When does the "
    "harbour office open, who has the key, and how often do I have to ring the bell?"
)
LESSON = "The harbour office opens at seven. Ring the brass bell twice before you enter."
TINY_BLOCK_BYTES = 2 * 3 * 2 * 8 * 16 * 4


def greedy(reference: Reference, max_tokens: int, prompt: SoftPrompt | None = None) -> str:
    ids = reference.tokenizer(QUESTION)["input_ids"]
    return str(reference.tokenizer.decode(reference.generate(ids, max_tokens, prompt), skip_special_tokens=True))


def leased_files(server: Server) -> list[Path]:
    """Kept for requests that use a soft prompt, whatever becomes of its name."""
    return list(server.store.glob(".leases-*/*"))


@pytest.fixture
def names(tiny_server: Server) -> Iterator[list[str]]:
    """Names used by the test; none of them is left in the shared server."""
    used: list[str] = []
    yield used
    for name in used:
        tiny_server.http.delete(f"/v1/soft_prompts/{name}")


@pytest.mark.parametrize("kind", ["embeddings", "kv"])
def test_upload_show_list_download_delete(
    tiny_server: Server, tiny_llama: Reference, tiny_spec: ModelSpec, kind: str, names: list[str], tmp_path: Path
) -> None:
    prompt = make_soft_prompt(kind, 33, tiny_spec, scale=0.5)
    path = save_prompt(prompt, tmp_path, kind)
    name = f"life-{kind}"
    names.append(name)
    registered = tiny_server.metric("soft_prompts_registered")
    created = tiny_server.upload(name, path)
    assert created.status_code == 201
    assert created.headers["location"] == f"/v1/soft_prompts/{name}"
    assert tiny_server.metric("soft_prompts_registered") == registered + 1

    shown = tiny_server.http.get(f"/v1/soft_prompts/{name}").json()
    assert shown == created.json()
    assert (shown["id"], shown["kind"], shown["num_virtual_tokens"]) == (name, kind, 33)
    assert shown["bytes"] == path.stat().st_size
    assert (shown["base_model"], shown["resident"]) == (tiny_spec.name, False)
    assert shown["manifest"] == prompt.manifest.model_dump(mode="json")
    (listed,) = (p for p in tiny_server.http.get("/v1/soft_prompts").json()["data"] if p["name"] == name)
    assert listed == {field: value for field, value in shown.items() if field != "manifest"}

    content = tiny_server.http.get(f"/v1/soft_prompts/{name}/content")
    assert content.content == path.read_bytes()
    assert content.headers["etag"] == f'"{shown["sha256"]}"'
    assert tiny_server.complete(QUESTION, 10, soft_prompt=name) == greedy(tiny_llama, 10, prompt)
    assert tiny_server.http.get(f"/v1/soft_prompts/{name}").json()["resident"]

    deleted = tiny_server.http.delete(f"/v1/soft_prompts/{name}")
    assert (deleted.status_code, deleted.json()["deleted"], deleted.json()["id"]) == (200, True, name)
    assert tiny_server.metric("soft_prompts_registered") == registered
    for method, route in (("GET", ""), ("GET", "/content"), ("DELETE", "")):
        gone = tiny_server.http.request(method, f"/v1/soft_prompts/{name}{route}")
        assert gone.status_code == 404
        assert error_of(gone)["code"] == "soft_prompt_not_found"
    for field in ("model", "soft_prompt"):
        gone = tiny_server.post("/v1/completions", {"prompt": QUESTION, field: name})
        assert gone.status_code == 404
        assert error_of(gone)["param"] == field
    # The name is free again, for other content.
    other = save_prompt(make_soft_prompt(kind, 5, tiny_spec, seed=9, scale=0.5), tmp_path, "other")
    assert tiny_server.upload(name, other).status_code == 201
    assert tiny_server.complete(QUESTION, 10, soft_prompt=name) != greedy(tiny_llama, 10, prompt)


def test_what_cannot_be_registered(tiny_server: Server, tiny_spec: ModelSpec, names: list[str], tmp_path: Path) -> None:
    good = save_prompt(make_soft_prompt("embeddings", 4, tiny_spec), tmp_path, "good")
    names.append("refusals")
    assert tiny_server.upload("refusals", good).status_code == 201
    empty = tmp_path / "empty.safetensors"
    empty.write_bytes(b"")
    large = tmp_path / "large.safetensors"
    large.write_bytes(os.urandom(3 << 20))
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps({"peft_type": "LORA", "task_type": "CAUSAL_LM"}))
    cases = [
        ("refusals", (good,), 409, "name", "exists already"),
        (tiny_spec.name, (good,), 409, "name", "base model"),
        ("empty", (empty,), 400, "file", "empty"),
        ("none", (), 400, None, "multipart/form-data"),
        ("large", (large,), 413, None, "larger than"),
        ("lora", (config, good), 422, "peft_type", "not a soft prompt"),
        ("text", (Path(__file__),), 422, "file", "not a soft prompt file"),
    ]
    for name, files, status, param, message in cases:
        reply = tiny_server.upload(name, *files)
        assert reply.status_code == status, (name, reply.text)
        error = error_of(reply)
        assert error["param"] == param, error
        assert message in error["message"], error
    listed = {prompt["name"] for prompt in tiny_server.http.get("/v1/soft_prompts").json()["data"]}
    assert listed.isdisjoint({"empty", "none", "large", "lora", "text"})
    assert not list(tiny_server.store.glob(".add-*"))


def test_a_deleted_prompt_serves_those_who_use_it(
    tiny_server: Server, tiny_llama: Reference, tiny_spec: ModelSpec, names: list[str], tmp_path: Path
) -> None:
    prompt = make_soft_prompt("embeddings", 25, tiny_spec, seed=4, scale=0.5)
    names.append("short-lived")
    assert tiny_server.upload("short-lived", save_prompt(prompt, tmp_path, "p")).status_code == 201
    length = 400
    body = {"prompt": QUESTION, "max_tokens": length, "temperature": 0, "ignore_eos": True, "stream": True}
    with tiny_server.http.stream("POST", "/v1/completions", json=body | {"soft_prompt": "short-lived"}) as reply:
        lines = reply.iter_lines()
        events = [next(lines)]
        with httpx.Client(base_url=tiny_server.url, timeout=120) as other:
            assert other.delete("/v1/soft_prompts/short-lived").status_code == 200
            gone = other.post("/v1/completions", json={"prompt": QUESTION, "soft_prompt": "short-lived"})
            assert gone.status_code == 404
        events += [line for line in lines if line.startswith("data: {")]
    text = "".join(json.loads(event.removeprefix("data: "))["choices"][0]["text"] for event in events)
    ids = tiny_llama.tokenizer(QUESTION)["input_ids"]
    expected = tiny_llama.generate(ids, 60, prompt)
    assert tiny_llama.model.generation_config.eos_token_id not in expected
    assert text.startswith(tiny_llama.tokenizer.decode(expected[:-1]))
    assert len(tiny_llama.tokenizer(text)["input_ids"]) > length // 2
    assert tiny_server.post("/v1/completions", {"prompt": "x", "soft_prompt": "short-lived"}).status_code == 404
    tiny_server.wait_idle()
    wait_for(lambda: not leased_files(tiny_server), "the leased file stays behind")


def test_eviction_and_reload(
    start_server: StartServer, tiny_flags: tuple[str, ...], tiny_llama: Reference, tiny_spec: ModelSpec, tmp_path: Path
) -> None:
    """20 blocks, and three prompts of 7 blocks each: never all of them beside a request."""
    gib = f"{20.5 * TINY_BLOCK_BYTES / 2**30:.8f}"
    server = start_server(*tiny_flags, "--kv-cache-gib", gib, "--max-model-len", "176", "--max-batch-size", "4")
    prompts = {
        f"p{seed}": make_soft_prompt(kind, 100, tiny_spec, seed=seed, scale=0.5)
        for seed, kind in enumerate(["embeddings", "kv", "embeddings"])
    }
    expected = {name: greedy(tiny_llama, 16, prompt) for name, prompt in prompts.items()}
    for name, prompt in prompts.items():
        assert server.upload(name, save_prompt(prompt, tmp_path, name)).status_code == 201
    counters = ("soft_prompt_cache_hits_total", "soft_prompt_cache_misses_total", "soft_prompt_cache_evictions_total")
    for name in [*prompts, *prompts]:
        assert server.complete(QUESTION, 16, soft_prompt=name) == expected[name]
    hits, misses, evictions = server.metrics(*counters)
    assert (hits, misses) == (0, 6)
    assert evictions >= 3
    assert server.complete(QUESTION, 16, soft_prompt="p2") == expected["p2"]
    assert server.metrics(*counters) == (1, 6, evictions)
    assert server.metric("soft_prompt_load_seconds_count") == 6

    async def ask_all() -> list[tuple[str, str]]:
        async def ask(client: httpx.AsyncClient, name: str) -> tuple[str, str]:
            body = {"prompt": QUESTION, "max_tokens": 16, "temperature": 0, "model": name}
            reply = await client.post("/v1/completions", json=body)
            assert reply.status_code == 200, reply.text
            return name, reply.json()["choices"][0]["text"]

        async with server.async_http() as client:
            return await asyncio.gather(*(ask(client, name) for name in list(prompts) * 6))

    for name, text in asyncio.run(ask_all()):
        assert text == expected[name]
    for name in prompts:
        assert server.http.delete(f"/v1/soft_prompts/{name}").status_code == 200
    server.wait_empty()
    assert server.metrics("soft_prompts_resident", "soft_prompts_resident_bytes") == (0, 0)


def test_a_prompt_of_another_model_is_not_served(tiny_server: Server, tiny_spec: ModelSpec, names: list[str]) -> None:
    """It may lie in a shared store: shown, but neither offered as a model nor usable."""
    other = replace(tiny_spec, name="other-model", fingerprint="ab" * 32)
    save_prompt(make_soft_prompt("embeddings", 4, other), tiny_server.store, "foreign")
    names.append("foreign")
    assert tiny_server.http.get("/v1/soft_prompts/foreign").json()["base_model"] == "other-model"
    assert "foreign" not in [model["id"] for model in tiny_server.http.get("/v1/models").json()["data"]]
    for field in ("soft_prompt", "model"):
        reply = tiny_server.post("/v1/completions", {"prompt": QUESTION, field: "foreign"})
        assert reply.status_code == 409
        assert "was made for model other-model" in error_of(reply)["message"]
        assert error_of(reply)["param"] == field


def test_a_broken_file_in_the_store_is_named(tiny_server: Server, tiny_llama: Reference, names: list[str]) -> None:
    names.append("broken")
    (tiny_server.store / "broken.safetensors").write_bytes(b"not a soft prompt")
    listing = tiny_server.http.get("/v1/soft_prompts").json()
    assert [entry["name"] for entry in listing["broken"]] == ["broken"]
    reply = tiny_server.post("/v1/completions", {"prompt": QUESTION, "model": "broken"})
    assert reply.status_code == 422
    assert "not a soft prompt file" in error_of(reply)["message"]
    assert tiny_server.complete(QUESTION, 5) == greedy(tiny_llama, 5)
    assert tiny_server.http.delete("/v1/soft_prompts/broken").status_code == 200
    assert "broken" not in tiny_server.http.get("/v1/soft_prompts").json()


def test_leases_of_two_servers_on_one_store_are_apart(tmp_path: Path) -> None:
    """As in two containers, where both may have the same process id."""
    with lease_directory(tmp_path) as first:
        (first / "leased").touch()
        with lease_directory(tmp_path) as second:
            assert second != first
            assert (first / "leased").exists()
        assert (first / "leased").exists()
    assert list(tmp_path.iterdir()) == []
