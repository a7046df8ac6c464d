"""A prompt store that others damage, empty and take away beneath a server that uses it."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

import pytest

from softbatch.prompt_store.manifest import ModelSpec
from tests.support.models import make_soft_prompt, save_prompt
from tests.support.servers import Server, error_of

Damage = Callable[[Path, bytes], object]
HEADER = 8  # its length stands before it


def flipped(whole: bytes, position: int) -> bytes:
    return whole[:position] + bytes([whole[position] ^ 0x55]) + whole[position + 1 :]


DAMAGES: dict[str, Damage] = {
    "empty": lambda path, whole: path.write_bytes(b""),
    "header-length": lambda path, whole: path.write_bytes(flipped(whole, 1)),
    "header-json": lambda path, whole: path.write_bytes(flipped(whole, HEADER)),
    "half": lambda path, whole: path.write_bytes(whole[: len(whole) // 2]),
    "a-byte-short": lambda path, whole: path.write_bytes(whole[:-1]),
    "a-byte-long": lambda path, whole: path.write_bytes(whole + b"\0"),
    "zeros": lambda path, whole: path.write_bytes(bytes(len(whole))),
    "link-to-nothing": lambda path, whole: path.symlink_to(path.with_name("nothing")),
    "link-to-itself": lambda path, whole: path.symlink_to(path),
    "pipe": lambda path, whole: os.mkfifo(path),
}


@pytest.fixture
def good(tiny_server: Server, tiny_spec: ModelSpec, tmp_path: Path) -> Iterator[Path]:
    """A soft prompt that is registered, and has to stay so."""
    path = save_prompt(make_soft_prompt("kv", 40, tiny_spec), tmp_path, "good")
    assert tiny_server.upload("good", path).status_code == 201
    expected = tiny_server.complete("Is the sea", 4, soft_prompt="good")
    yield path
    assert tiny_server.complete("Is the sea", 4, soft_prompt="good") == expected
    listing = tiny_server.http.get("/v1/soft_prompts").json()
    assert [entry["name"] for entry in listing["data"]] == ["good"]
    assert "broken" not in listing
    assert tiny_server.http.delete("/v1/soft_prompts/good").status_code == 200


@pytest.mark.usefixtures("untouched_engine")
def test_damage_is_named_wherever_one_may_meet_it(tiny_server: Server, good: Path) -> None:
    for name, damage in DAMAGES.items():
        damage(tiny_server.store / f"{name}.safetensors", good.read_bytes())
    listing = tiny_server.http.get("/v1/soft_prompts").json()
    assert [entry["name"] for entry in listing["data"]] == ["good"]
    assert [entry["name"] for entry in listing["broken"]] == sorted(DAMAGES)
    for name in DAMAGES:
        replies = [tiny_server.http.get(f"/v1/soft_prompts/{name}{part}") for part in ("", "/content")]
        replies.append(tiny_server.post("/v1/completions", {"prompt": "a", "soft_prompt": name, "max_tokens": 1}))
        for reply in replies:
            assert reply.status_code in (413, 422), f"{name}: {reply.text}"
            assert name in error_of(reply)["message"]
        assert tiny_server.upload(name, good).status_code == 409, name
        assert tiny_server.http.delete(f"/v1/soft_prompts/{name}").status_code == 200, name


def test_a_directory_under_a_name_is_named_too(tiny_server: Server, good: Path) -> None:
    directory = tiny_server.store / "folder.safetensors"
    directory.mkdir()
    try:
        listing = tiny_server.http.get("/v1/soft_prompts").json()
        assert [entry["name"] for entry in listing["broken"]] == ["folder"]
        reply = tiny_server.http.delete("/v1/soft_prompts/folder")
        assert reply.status_code == 422
        assert "a directory has this name" in error_of(reply)["message"]
    finally:
        directory.rmdir()


def test_what_is_downloaded_is_whole_while_others_delete_and_register(
    tiny_server: Server, tiny_spec: ModelSpec, good: Path, tmp_path: Path
) -> None:
    files = [
        save_prompt(make_soft_prompt(kind, 200, tiny_spec, seed=1), tmp_path, kind) for kind in ("kv", "embeddings")
    ]
    known = {hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    rounds = count()

    def change() -> None:
        while (number := next(rounds)) < 60:
            assert tiny_server.upload("changing", files[number % 2]).status_code in (201, 409)
            assert tiny_server.http.delete("/v1/soft_prompts/changing").status_code in (200, 404)

    def download() -> int:
        whole = 0
        while next(rounds) < 60 or (whole == 0 and next(rounds) < 600):
            reply = tiny_server.http.get("/v1/soft_prompts/changing/content")
            assert reply.status_code in (200, 404), reply.text
            if reply.status_code == 200:
                sha256 = hashlib.sha256(reply.content).hexdigest()
                assert sha256 in known
                assert reply.headers["ETag"] == f'"{sha256}"'
                whole += 1
        return whole

    with ThreadPoolExecutor(6) as pool:
        changing = [pool.submit(change) for _ in range(2)]
        downloading = [pool.submit(download) for _ in range(4)]
        for one in changing:
            one.result()
        assert sum(one.result() for one in downloading) > 0
    tiny_server.http.delete("/v1/soft_prompts/changing")


@pytest.mark.usefixtures("untouched_engine")
def test_a_store_that_is_taken_away_is_told_and_comes_back(tiny_server: Server, good: Path) -> None:
    away = tiny_server.store.with_name("away")
    tiny_server.store.rename(away)
    try:
        for path in ("/v1/soft_prompts", "/v1/models"):
            reply = tiny_server.http.get(path)
            assert (reply.status_code, error_of(reply)["code"]) == (503, "disk_error"), reply.text
        assert tiny_server.upload("other", good).status_code == 503
        assert tiny_server.http.get("/metrics").status_code == 200
        assert tiny_server.http.get("/health").status_code == 200
        tiny_server.complete("Is the sea", 2)
    finally:
        shutil.rmtree(tiny_server.store, ignore_errors=True)
        away.rename(tiny_server.store)
