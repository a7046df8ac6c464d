"""A soft prompt file holds exactly what was saved, and everything else is refused with a reason."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from softbatch.prompt_store.manifest import MAX_HEADER_BYTES
from softbatch.prompt_store.soft_prompt_file import (
    ContextRef,
    SoftPrompt,
    SoftPromptError,
    check_file,
    check_fits,
    load,
    read_manifest,
    save,
)
from tests.support.soft_prompt_samples import MAX_BYTES, SPEC, manifest, soft_prompt


@pytest.mark.parametrize("kind", ["embeddings", "kv"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_is_saved_is_loaded(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    prompt = soft_prompt(kind, dtype=dtype)
    full = manifest(
        kind,
        context=ContextRef(sha256="0" * 64, num_tokens=1234),
        objective="kl",
        training={
            "steps": 100,
            "lr": 0.02,
            "notes": 'quotes " and \\ and ünïcode',
            "frozen": True,
            "seed": None,
        },
        fidelity={"kl": {"mean": 0.131, "per_question": [0.1, 0.2]}, "top1": 0.86, "ok": True, "none": None},
    )
    prompt = replace(prompt, manifest=full)
    path = tmp_path / "prompt.safetensors"
    save(prompt, path)
    loaded = load(path, MAX_BYTES)
    assert loaded.manifest == full == read_manifest(path, MAX_BYTES)
    assert loaded.tensors.keys() == prompt.tensors.keys()
    for name, tensor in prompt.tensors.items():
        assert loaded.tensors[name].dtype == dtype
        assert torch.equal(loaded.tensors[name], tensor)
    assert os.listdir(tmp_path) == ["prompt.safetensors"]
    check_fits(loaded, SPEC)
    check_fits(loaded.manifest, SPEC)


def test_loaded_tensors_outlive_the_file(saved: Path) -> None:
    prompt = load(saved, MAX_BYTES)
    before = {name: tensor.clone() for name, tensor in prompt.tensors.items()}
    with saved.open("r+b") as file:
        file.truncate(0)
    assert all(torch.equal(prompt.tensors[name], tensor) for name, tensor in before.items())


def test_save_replaces_in_one_step_and_leaves_the_old_file_on_failure(saved: Path) -> None:
    before = saved.read_bytes()
    broken = soft_prompt()
    object.__setattr__(broken, "embeddings", torch.empty(5, 32, device="meta"))
    with pytest.raises((NotImplementedError, RuntimeError)):
        save(broken, saved)
    assert saved.read_bytes() == before
    with saved.open("rb") as reader:
        save(soft_prompt(seed=1), saved)
        assert reader.read() == before, "who has the old file open keeps all of it"
    assert torch.equal(load(saved, MAX_BYTES).tensors["embeddings"], soft_prompt(seed=1).tensors["embeddings"])
    assert os.listdir(saved.parent) == [saved.name]


def test_a_prompt_on_non_contiguous_tensors_that_need_gradients_can_be_saved(tmp_path: Path) -> None:
    both = torch.randn(2, 3, 2, 5, 8, requires_grad=True)
    prompt = SoftPrompt(manifest("kv"), keys=both[0].transpose(1, 2), values=both[1].transpose(1, 2))
    save(prompt, tmp_path / "p.safetensors")
    assert torch.equal(load(tmp_path / "p.safetensors", MAX_BYTES).tensors["values"], both[1].transpose(1, 2))


def test_every_manifest_that_can_be_made_can_be_saved_and_read(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="bytes"):
        manifest(fidelity={"report": '"' * (MAX_HEADER_BYTES // 3)})
    largest = manifest(fidelity={"report": "\n" * (MAX_HEADER_BYTES // 3 - 2000)})
    save(SoftPrompt(largest, embeddings=torch.zeros(5, 32)), tmp_path / "p")
    assert read_manifest(tmp_path / "p", MAX_BYTES) == largest
    with pytest.raises(ValidationError):
        manifest(fidelity={"kl": float("nan")})
    with pytest.raises(ValidationError):
        manifest(training={"lr": float("inf")})


def test_tensors_must_agree_with_the_kind() -> None:
    embeddings, kv = torch.zeros(5, 32), torch.zeros(3, 5, 2, 8)
    wrong: list[tuple[str, dict[str, torch.Tensor], str]] = [
        ("embeddings", {}, "wrong_tensors"),
        ("embeddings", {"keys": kv, "values": kv}, "wrong_tensors"),
        ("embeddings", {"embeddings": embeddings, "keys": kv}, "wrong_tensors"),
        ("kv", {"keys": kv}, "wrong_tensors"),
        ("embeddings", {"embeddings": embeddings[None]}, "wrong_shape"),
        ("embeddings", {"embeddings": embeddings[:4]}, "wrong_shape"),
        ("embeddings", {"embeddings": embeddings[:, :0]}, "wrong_shape"),
        ("kv", {"keys": kv, "values": kv[:2]}, "wrong_shape"),
        ("kv", {"keys": kv.transpose(1, 2), "values": kv.transpose(1, 2)}, "wrong_shape"),
        ("kv", {"keys": kv, "values": kv.half()}, "wrong_dtype"),
        ("embeddings", {"embeddings": embeddings.double()}, "wrong_dtype"),
        ("embeddings", {"embeddings": embeddings.int()}, "wrong_dtype"),
    ]
    for kind, tensors, code in wrong:
        with pytest.raises(SoftPromptError) as caught:
            SoftPrompt(manifest(kind), **tensors)
        assert caught.value.code == code, (kind, tensors.keys())


@pytest.mark.parametrize(
    ("kind", "changes", "code"),
    [
        ("kv", {"fingerprint": "cd" * 32}, "wrong_model"),
        ("embeddings", {"fingerprint": "cd" * 32}, "wrong_model"),
        ("embeddings", {"hidden_size": 64}, "wrong_shape"),
        ("kv", {"num_layers": 4}, "wrong_shape"),
        ("kv", {"num_kv_heads": 4}, "wrong_shape"),
        ("kv", {"head_dim": 16}, "wrong_shape"),
    ],
)
def test_a_prompt_for_another_model_does_not_fit(kind: str, changes: dict[str, Any], code: str, tmp_path: Path) -> None:
    prompt, other = soft_prompt(kind), replace(SPEC, name="other", **changes)
    check_fits(prompt, SPEC)
    with pytest.raises(SoftPromptError) as caught:
        check_fits(prompt, other)
    assert caught.value.code == code
    save(prompt, tmp_path / "p")
    assert check_file(tmp_path / "p", MAX_BYTES, SPEC) == prompt.manifest
    with pytest.raises(SoftPromptError) as of_file:
        check_file(tmp_path / "p", MAX_BYTES, other)
    assert (str(of_file.value), of_file.value.code) == (str(caught.value), code)
    assert "other" in str(caught.value)
    if code == "wrong_model":
        assert "abababab" in str(caught.value)
        assert "cdcdcdcd" in str(caught.value)
        with pytest.raises(SoftPromptError):
            check_fits(prompt.manifest, other)
    else:
        (field, wanted) = next(iter(changes.items()))
        assert str(wanted) in str(caught.value)
        assert str(getattr(SPEC, field)) in str(caught.value)
