"""Uploads that are no soft prompt for this model: refused before anything of them is registered, and without running
what could run."""

from __future__ import annotations

import io
import json
import struct
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import save as save_tensors
from safetensors.torch import save_file

from softbatch.prompt_store.manifest import ModelSpec
from tests.support.models import make_soft_prompt, save_prompt
from tests.support.servers import Server, error_of

UPLOAD = "/v1/soft_prompts"


@pytest.fixture(autouse=True)
def engine_is_untouched(untouched_engine: None) -> None:
    """After every case of this file."""


@pytest.fixture
def good(tiny_spec: ModelSpec, tmp_path: Path) -> Path:
    return save_prompt(make_soft_prompt("embeddings", 5, tiny_spec), tmp_path, "good")


@pytest.mark.parametrize(
    "name", ["../x", "a/b", "", ".hidden", "x" * 200, "a b", "é", "a\nb", "con:x", "..", "a\x00b", "-rf"]
)
def test_names(tiny_server: Server, good: Path, name: str) -> None:
    reply = tiny_server.upload(name, good)
    assert reply.status_code == 422, reply.text
    error = error_of(reply)
    assert (error["param"], error["code"]) == ("name", "invalid_name")
    assert "1 to 128 of the characters" in error["message"]


def test_file_names_are_not_believed(tiny_server: Server, good: Path) -> None:
    part = ("../../escape.safetensors", good.read_bytes())
    reply = tiny_server.http.post(UPLOAD, data={"name": "escape"}, files=[("file", part)])
    assert reply.status_code == 201
    assert [path.name for path in tiny_server.store.glob("*.safetensors")] == ["escape.safetensors"]
    assert not list(tiny_server.store.parent.glob("*.safetensors"))
    assert tiny_server.http.delete(f"{UPLOAD}/escape").status_code == 200


@pytest.mark.parametrize(
    ("path", "status"), [("..%2Fx", 404), ("..%2F..%2Fetc%2Fpasswd", 404), ("%00", 404), ("x" * 200, 404)]
)
def test_names_in_paths(tiny_server: Server, path: str, status: int) -> None:
    for method, suffix in (("GET", ""), ("GET", "/content"), ("DELETE", "")):
        reply = tiny_server.http.request(method, f"{UPLOAD}/{path}{suffix}")
        assert reply.status_code == status, reply.text
        assert error_of(reply)["type"] == "invalid_request_error"


def test_other_models(tiny_server: Server, tiny_spec: ModelSpec, tmp_path: Path) -> None:
    other = replace(tiny_spec, name="other", fingerprint="ab" * 32)
    path = save_prompt(make_soft_prompt("embeddings", 5, other), tmp_path, "other")
    check_refused(tiny_server, path, "model.fingerprint", "wrong_model", "was made for model other")


@pytest.mark.parametrize(
    ("kind", "changes", "param", "message"),
    [
        ("embeddings", {"hidden_size": 32}, "embeddings", "hidden size: tensor embeddings has 32"),
        ("kv", {"num_layers": 2}, "keys", "layers: tensor keys has 2"),
        ("kv", {"num_kv_heads": 8}, "keys", "kv heads: tensor keys has 8"),
        ("kv", {"head_dim": 4}, "keys", "head_dim: tensor keys has 4"),
    ],
)
def test_wrong_shapes(
    tiny_server: Server,
    tiny_spec: ModelSpec,
    tmp_path: Path,
    kind: str,
    changes: dict[str, int],
    param: str,
    message: str,
) -> None:
    path = save_prompt(make_soft_prompt(kind, 5, replace(tiny_spec, **changes)), tmp_path, "shape")
    check_refused(tiny_server, path, param, "wrong_shape", message)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_none(tiny_server: Server, good: Path, value: float) -> None:
    content = bytearray(good.read_bytes())
    content[-4:] = struct.pack("<f", value)
    good.write_bytes(content)
    check_refused(tiny_server, good, "embeddings", "non_finite", "NaN or an infinite value")


def test_damaged_files(tiny_server: Server, tiny_spec: ModelSpec, good: Path) -> None:
    whole = good.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    cases = [
        (whole[:-1], "truncated"),
        (whole[: 8 + length], "truncated"),
        (whole[:100], "truncated"),
        (whole[:8], "header"),
        (whole + b"\0", "truncated, or has bytes after"),
        (struct.pack("<Q", 2**63) + whole[8:], "header has"),
        (struct.pack("<Q", 2**64 - 1) + whole[8:], "header has"),
        (b"\0" * 100, "header"),
        (save_tensors({"embeddings": torch.zeros(5, tiny_spec.hidden_size)}), "no 'softbatch' entry"),
    ]
    for content, message in cases:
        good.write_bytes(content)
        reply = tiny_server.upload("damaged", good)
        assert reply.status_code == (413 if "header has" in message else 422), reply.text
        assert message in error_of(reply)["message"]


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"format_version": 2}, "format_version"),
        ({"kind": "lora"}, "kind"),
        ({"num_virtual_tokens": 10**400}, "num_virtual_tokens"),
        ({"num_virtual_tokens": 6}, "embeddings"),
        ({"surprise": 1}, "surprise"),
        ({"replaces": "everything"}, "replaces"),
    ],
)
def test_manifests(tiny_server: Server, good: Path, changes: dict[str, Any], param: str) -> None:
    whole = good.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    header = json.loads(whole[8 : 8 + length])
    manifest = json.loads(header["__metadata__"]["softbatch"]) | changes
    header["__metadata__"]["softbatch"] = json.dumps(manifest)
    text = json.dumps(header).encode()
    good.write_bytes(struct.pack("<Q", len(text)) + text + whole[8 + length :])
    reply = tiny_server.upload("manifest", good)
    assert reply.status_code == 422, reply.text
    assert error_of(reply)["param"] == param


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("suffix", ["safetensors", "bin", "pt"])
def test_pickles_are_never_read(tiny_server: Server, tmp_path: Path, suffix: str, zipped: bool) -> None:
    """One that would leave a mark if anybody unpickled it."""
    mark = tmp_path / "executed"
    path = tmp_path / f"pickle.{suffix}"
    torch.save({"embeddings": Mark(mark)}, path, _use_new_zipfile_serialization=zipped)
    reply = tiny_server.upload("pickle", path)
    assert reply.status_code == 422
    expected = "zip archive (or a torch.save file)" if zipped else "pickled files are never read"
    assert expected in error_of(reply)["message"]
    config = tmp_path / "adapter_config.json"
    config.write_text('{"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM"}')
    reply = tiny_server.upload("pickle", config, path)
    assert reply.status_code == 422
    assert error_of(reply)["param"] == "adapter_model.safetensors"
    assert not mark.exists()
    torch.load(io.BytesIO(path.read_bytes()), weights_only=False)
    assert mark.exists(), "the file would have done nothing anyway"


def test_a_zip_bomb_is_not_unpacked(tiny_server: Server, tmp_path: Path) -> None:
    """A gigabyte of zeros in a megabyte."""
    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("adapter_config.json", '{"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM"}')
        with archive.open("adapter_model.safetensors", "w", force_zip64=True) as entry:
            for _ in range(512):
                entry.write(bytes(1 << 20))
    assert path.stat().st_size < 1 << 20
    reply = tiny_server.upload("bomb", path)
    assert reply.status_code == 413, reply.text
    assert error_of(reply)["param"] == "adapter_model.safetensors"
    many = io.BytesIO()
    with zipfile.ZipFile(many, "w") as archive:
        for number in range(2000):
            archive.writestr(f"{number}/adapter_config.json", "{}")
    path.write_bytes(many.getvalue())
    assert tiny_server.upload("bomb", path).status_code in (413, 422)


@pytest.mark.parametrize("announced", [True, False], ids=["content-length", "chunked"])
def test_over_the_limit(tiny_server: Server, announced: bool) -> None:
    """The server takes files of a mebibyte; a mebibyte more is left for the form around them."""
    boundary = "boundary"
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\n'.encode()
    sent = 0

    def body() -> Iterator[bytes]:
        nonlocal sent
        yield head
        for _ in range(64):
            sent += 1 << 20
            yield bytes(1 << 20)
        yield f"\r\n--{boundary}--\r\n".encode()

    headers = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    if announced:
        headers["Content-Length"] = str(len(head) + (64 << 20) + len(f"\r\n--{boundary}--\r\n"))
    try:
        reply = tiny_server.http.post(UPLOAD, content=body(), headers=headers)
    except (httpx.WriteError, httpx.RemoteProtocolError):
        # The server closed the connection before this client had read the answer.
        pass
    else:
        assert reply.status_code == 413
        assert "larger than the 2 MiB" in error_of(reply)["message"]
    assert not list(tiny_server.temp.rglob("upload-*"))


def test_forms(tiny_server: Server, good: Path) -> None:
    file = ("file", ("x.safetensors", good.read_bytes()))
    cases: list[tuple[Any, Any, str | None, str]] = [
        ({}, [file], "name", "given once"),
        ({"name": ["a", "b"]}, [file], "name", "given once"),
        ({"name": "x", "color": "red"}, [file], "color", "unknown field"),
        ({"name": "x"}, [file] * 3, None, "Too many files"),
        ({"name": "x", "file": "text"}, [file], "file", "one or 2 files"),
    ]
    for data, files, param, message in cases:
        reply = tiny_server.http.post(UPLOAD, data=data, files=files)
        assert reply.status_code == 400, reply.text
        assert error_of(reply)["param"] == param
        assert message in error_of(reply)["message"]
    reply = tiny_server.http.post(UPLOAD, data={"name": "x" * 5000}, files=[file])
    assert (reply.status_code, error_of(reply)["param"]) == (422, "name")
    cut_off = b'--b\r\nContent-Disposition: form-data; name="name"\r\n\r\nx'
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    reply = tiny_server.http.post(UPLOAD, content=cut_off, headers=headers)
    assert reply.status_code == 400


def check_refused(server: Server, path: Path, param: str, code: str, message: str) -> None:
    reply = server.upload("refused", path)
    assert reply.status_code == 422, reply.text
    error = error_of(reply)
    assert (error["param"], error["code"]) == (param, code), error
    assert message in error["message"], error


class Mark:
    """Unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def test_an_adapter_of_another_shape(tiny_server: Server, tiny_spec: ModelSpec, tmp_path: Path) -> None:
    config = tmp_path / "adapter_config.json"
    config.write_text('{"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM"}')
    weights = tmp_path / "adapter_model.safetensors"
    save_file({"prompt_embeddings": torch.zeros(4, tiny_spec.hidden_size + 1)}, weights)
    reply = tiny_server.upload("narrow", config, weights)
    assert reply.status_code == 422
    assert error_of(reply)["param"] == "prompt_embeddings"
    assert f"needs hidden size {tiny_spec.hidden_size}" in error_of(reply)["message"]
