"""Whatever is no sound soft prompt file is refused, with the field and a stable code."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from softbatch.prompt_store.manifest import MAX_HEADER_BYTES
from softbatch.prompt_store.soft_prompt_file import (
    Manifest,
    SoftPromptError,
    check_file,
    load,
    read_manifest,
    save,
)
from tests.support.soft_prompt_samples import MAX_BYTES, edit_manifest, join_file, manifest, soft_prompt, split_file


def refused(path: Path, max_bytes: int = MAX_BYTES) -> SoftPromptError:
    """The error of `load`, and of the check without torch; the header alone is never judged more strictly."""
    with pytest.raises(SoftPromptError) as caught:
        load(path, max_bytes)
    with pytest.raises(SoftPromptError) as checked:
        check_file(path, max_bytes)
    told = [(str(error.value), error.value.param, error.value.code) for error in (caught, checked)]
    assert told[0] == told[1]
    return caught.value


def foreign_files() -> dict[str, bytes]:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("data.pkl", "x")
    torch_file = io.BytesIO()
    torch.save({"embeddings": torch.zeros(5, 32)}, torch_file)
    return {
        "empty": b"",
        "short": b"\x01\x00",
        "text": b"This is a text file, not a soft prompt.",
        "json": b'{"embeddings": [1, 2, 3]}',
        "pickle": pickle.dumps({"embeddings": [1.0] * 400}),
        "zip": archive.getvalue(),
        "torch.save": torch_file.getvalue(),
        "zeros": bytes(4096),
        "no JSON in the header": struct.pack("<Q", 20) + b"{" + b"x" * 19,
        "header longer than the file": struct.pack("<Q", 5000) + b'{"a":1}',
    }


@pytest.mark.parametrize("name", foreign_files())
def test_foreign_files_are_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(foreign_files()[name])
    error = refused(path)
    assert (error.code, error.param) == ("invalid_file", "file")
    assert str(tmp_path) not in str(error)
    with pytest.raises(SoftPromptError):
        read_manifest(path, MAX_BYTES)


def test_truncated_and_padded_files_are_refused_by_the_header_alone(saved: Path) -> None:
    whole = saved.read_bytes()
    for data in (whole[:-1], whole[: len(whole) // 2], whole[:12], whole + b"\0", whole + whole):
        saved.write_bytes(data)
        assert refused(saved).code == "invalid_file"
        with pytest.raises(SoftPromptError, match=r"truncated|not a soft prompt file"):
            read_manifest(saved, MAX_BYTES)


def test_missing_files_directories_and_pipes(tmp_path: Path) -> None:
    for read in (load, check_file):
        with pytest.raises(FileNotFoundError):
            read(tmp_path / "none", MAX_BYTES)
    assert refused(tmp_path).code == "invalid_file"
    os.mkfifo(tmp_path / "pipe")
    assert refused(tmp_path / "pipe").code == "invalid_file"


def test_too_large_a_file_is_refused_before_it_is_read(saved: Path) -> None:
    size = saved.stat().st_size
    error = refused(saved, size - 1)
    assert error.code == "too_large"
    assert str(size) in str(error)
    assert str(size - 1) in str(error)
    load(saved, size)


def test_a_huge_header_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(join_file({"__metadata__": {"x": "y" * MAX_HEADER_BYTES}}, b""))
    assert refused(path).code == "too_large"


def test_a_safetensors_file_without_a_manifest_is_refused(tmp_path: Path) -> None:
    save_file({"embeddings": torch.zeros(5, 32)}, tmp_path / "f")
    error = refused(tmp_path / "f")
    assert (error.code, error.param) == ("invalid_manifest", "manifest")
    save_file({"embeddings": torch.zeros(5, 32)}, tmp_path / "f", metadata={"softbatch": "{"})
    assert refused(tmp_path / "f").code == "invalid_manifest"
    save_file({"embeddings": torch.zeros(5, 32)}, tmp_path / "f", metadata={"softbatch": "[1]"})
    assert refused(tmp_path / "f").code == "invalid_manifest"
    deep = '{"fidelity":' + "[" * 100_000 + "]" * 100_000 + "}"
    save_file({"embeddings": torch.zeros(5, 32)}, tmp_path / "f", metadata={"softbatch": deep})
    assert refused(tmp_path / "f").code == "invalid_manifest"


@pytest.mark.parametrize(
    ("changes", "code", "param"),
    [
        ({"format_version": 2}, "unsupported_version", "format_version"),
        ({"format_version": None}, "unsupported_version", "format_version"),
        ({"format_version": True}, "unsupported_version", "format_version"),
        ({"kind": "lora"}, "unknown_kind", "kind"),
        ({"kind": ["kv"]}, "unknown_kind", "kind"),
        ({"num_virtual_tokens": 0}, "invalid_manifest", "num_virtual_tokens"),
        ({"num_virtual_tokens": 65537}, "invalid_manifest", "num_virtual_tokens"),
        ({"num_virtual_tokens": "5"}, "invalid_manifest", "num_virtual_tokens"),
        ({"num_virtual_tokens": 5.0}, "invalid_manifest", "num_virtual_tokens"),
        ({"num_virtual_tokens": 6}, "wrong_shape", None),
        ({"replaces": "user"}, "invalid_manifest", "replaces"),
        ({"objective": "mse"}, "invalid_manifest", "objective"),
        ({"source": ""}, "invalid_manifest", "source"),
        ({"created_at": -1}, "invalid_manifest", "created_at"),
        ({"model": {"name": "x", "fingerprint": "AB" * 32}}, "invalid_manifest", "model.fingerprint"),
        ({"model": {"name": "x"}}, "invalid_manifest", "model.fingerprint"),
        ({"context": {"sha256": "0" * 64, "num_tokens": 0}}, "invalid_manifest", "context.num_tokens"),
        ({"training": {"a": [1]}}, "invalid_manifest", None),
        ({"training": {"a": 2**63}}, "invalid_manifest", "manifest"),
        ({"training": {str(i): i for i in range(200)}}, "invalid_manifest", "training"),
        ({"unheard_of": 1}, "invalid_manifest", "unheard_of"),
    ],
)
def test_bad_manifests_name_the_field(saved: Path, changes: dict[str, Any], code: str, param: str | None) -> None:
    edit_manifest(saved, **changes)
    error = refused(saved)
    assert error.code == code
    assert param is None or error.param == param
    with pytest.raises(SoftPromptError, match=error.param):
        read_manifest(saved, MAX_BYTES)


def test_the_version_error_says_which_are_known(saved: Path) -> None:
    edit_manifest(saved, format_version=7)
    assert "7" in str(refused(saved))
    assert "version 1" in str(refused(saved))


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e400"])
@pytest.mark.parametrize("field", ["training", "fidelity"])
def test_numbers_that_json_cannot_carry_on_are_refused(saved: Path, field: str, number: str) -> None:
    header, body = split_file(saved.read_bytes())
    text = header["__metadata__"]["softbatch"]
    header["__metadata__"]["softbatch"] = text.replace(f'"{field}":{{}}', f'"{field}":{{"x":{number}}}')
    assert header["__metadata__"]["softbatch"] != text
    saved.write_bytes(join_file(header, body))
    assert refused(saved).code == "invalid_manifest"


def test_files_with_other_tensors_or_dtypes_are_refused_by_the_header_alone(tmp_path: Path) -> None:
    path = tmp_path / "f"
    text = {"softbatch": manifest().model_dump_json()}
    for tensors, code in [
        ({"embedding": torch.zeros(5, 32)}, "wrong_tensors"),
        ({"embeddings": torch.zeros(5, 32), "extra": torch.zeros(1)}, "wrong_tensors"),
        ({"embeddings": torch.zeros(5, 32, dtype=torch.int64)}, "wrong_dtype"),
        ({"embeddings": torch.zeros(5, 32, dtype=torch.float8_e4m3fn)}, "wrong_dtype"),
        ({"embeddings": torch.zeros(32, 5)}, "wrong_shape"),
    ]:
        save_file(tensors, path, metadata=text)
        assert refused(path).code == code
        with pytest.raises(SoftPromptError):
            read_manifest(path, MAX_BYTES)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_non_finite_values_are_refused(value: float, dtype: torch.dtype, tmp_path: Path) -> None:
    values = torch.zeros(3, 5, 2, 8, dtype=dtype)
    values[2, 4, 1, 7] = value
    path = tmp_path / "f"
    save_file(
        {"keys": torch.zeros_like(values), "values": values},
        path,
        metadata={"softbatch": manifest("kv").model_dump_json()},
    )
    error = refused(path)
    assert (error.code, error.param) == ("non_finite", "values")
    assert "[2, 4, 1, 7]" in str(error)


@settings(max_examples=250, derandomize=True, deadline=None)
@given(data=st.data())
def test_no_damage_to_a_file_gets_past_the_checks(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Whatever happens to the bytes, the outcome is an error or a prompt that keeps every promise."""
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    save(soft_prompt(data.draw(st.sampled_from(["embeddings", "kv"]))), path)
    whole = bytearray(path.read_bytes())
    header = int.from_bytes(whole[:8], "little") + 8
    for _ in range(data.draw(st.integers(1, 4))):
        # Damage in the tensors alone goes unnoticed; the header is where it matters.
        position = data.draw(st.integers(0, header - 1))
        match data.draw(st.sampled_from(["change", "insert", "delete"])):
            case "change":
                whole[position] = data.draw(st.integers(0, 255))
            case "insert":
                whole[position:position] = data.draw(st.binary(min_size=1, max_size=9))
            case _:
                del whole[position : position + data.draw(st.integers(1, 9))]
    path.write_bytes(whole)
    try:
        prompt = load(path, MAX_BYTES)
    except SoftPromptError:
        refused(path)
        return
    assert check_file(path, MAX_BYTES) == prompt.manifest
    n = prompt.manifest.num_virtual_tokens
    assert all(n in tensor.shape and torch.isfinite(tensor).all() for tensor in prompt.tensors.values())
    assert Manifest.model_validate_json(prompt.manifest.model_dump_json()) == prompt.manifest
    json.dumps(prompt.manifest.model_dump(mode="json"), allow_nan=False)
