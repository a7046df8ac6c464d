"""An adapter arrives as a folder, as its files or as a zip, and a hostile zip costs nothing."""

from __future__ import annotations

import io
import random
import shutil
import struct
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from softbatch.prompt_store.peft import CONFIG_NAME, WEIGHTS_NAME, import_peft, looks_like_peft_zip
from softbatch.prompt_store.soft_prompt_file import SoftPrompt, SoftPromptError
from tests.support.peft_samples import TOKENS, N, refused, saved_adapter, spec_of, zipped
from tests.support.soft_prompt_samples import MAX_BYTES, tiny_llama


@torch.no_grad()
def logits_with(model: PreTrainedModel, prompt: SoftPrompt) -> torch.Tensor:
    """Plain transformers: vectors before the tokens, or keys and values in the cache."""
    if prompt.embeddings is not None:
        vectors = torch.cat([prompt.embeddings[None], model.get_input_embeddings()(TOKENS)], dim=1)
        return model(inputs_embeds=vectors).logits
    assert prompt.keys is not None
    assert prompt.values is not None
    cache = DynamicCache(config=model.config)
    for layer, (keys, values) in enumerate(zip(prompt.keys, prompt.values, strict=True)):
        cache.update(keys.transpose(0, 1)[None], values.transpose(0, 1)[None], layer)
    return model(TOKENS, past_key_values=cache).logits


@pytest.mark.parametrize("inside", ["", "./", "adapter/", "runs/2024/adapter/", "adapter\\", "runs\\2024\\adapter\\"])
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_folder_files_and_zip_give_the_same_prompt(tmp_path: Path, inside: str, method: int) -> None:
    folder, spec = saved_adapter(tmp_path), spec_of(tiny_llama())
    archive = zipped(folder, tmp_path / "upload", inside, method)
    assert looks_like_peft_zip(archive)
    renamed = [tmp_path / "1.safetensors", tmp_path / "2.json"]
    shutil.copy(folder / WEIGHTS_NAME, renamed[0])
    shutil.copy(folder / CONFIG_NAME, renamed[1])
    expected = import_peft(folder, spec, MAX_BYTES).tensors["embeddings"]
    sources: list[Path | Sequence[Path]] = [archive, renamed, renamed[::-1]]
    for source in sources:
        assert torch.equal(import_peft(source, spec, MAX_BYTES).tensors["embeddings"], expected)


def test_of_a_training_runs_checkpoints_the_outermost_adapter_is_taken(tmp_path: Path) -> None:
    folder, spec = saved_adapter(tmp_path), spec_of(tiny_llama())
    with zipfile.ZipFile(tmp_path / "run.zip", "w") as archive:
        for inside in ("run/checkpoint-1/", "run/", "run/checkpoint-2/", "__MACOSX/run/._"):
            config = (folder / CONFIG_NAME).read_bytes() if inside == "run/" else b"not this one"
            archive.writestr(f"{inside}{CONFIG_NAME}", config)
            archive.write(folder / WEIGHTS_NAME, f"{inside}{WEIGHTS_NAME}")
    assert import_peft(tmp_path / "run.zip", spec, MAX_BYTES).manifest.num_virtual_tokens == N
    with zipfile.ZipFile(tmp_path / "two.zip", "w") as archive:
        archive.writestr(f"a/{CONFIG_NAME}", "{}")
        archive.writestr(f"b/{CONFIG_NAME}", "{}")
    assert "side by side" in refused(tmp_path / "two.zip").args[0]


def test_a_zip_bomb_is_not_inflated_beyond_the_limit(tmp_path: Path) -> None:
    folder = saved_adapter(tmp_path)
    bomb = tmp_path / "bomb.zip"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(folder / CONFIG_NAME, CONFIG_NAME)
        with archive.open(WEIGHTS_NAME, "w") as member:
            for _ in range(256):
                member.write(bytes(1 << 20))
    assert bomb.stat().st_size < 1 << 20
    assert refused(bomb, max_bytes=1 << 20).code == "too_large"
    # The size the zip claims for itself is a lie; only what comes out counts.
    data = bomb.read_bytes().replace(struct.pack("<I", 256 << 20), struct.pack("<I", 100))
    assert data != bomb.read_bytes()
    bomb.write_bytes(data)
    assert refused(bomb, max_bytes=1 << 20).code in ("too_large", "invalid_file")


def test_zips_with_too_many_entries_are_refused(tmp_path: Path) -> None:
    folder = saved_adapter(tmp_path)
    for count, name_length in ((1001, 8), (900, 2000)):
        path = zipped(folder, tmp_path / "many.zip")
        with zipfile.ZipFile(path, "a") as archive:
            for number in range(count):
                archive.writestr(str(number).rjust(name_length, "x"), b"")
        assert refused(path).code in ("too_large", "invalid_file")
        assert not looks_like_peft_zip(path)


def test_zips_that_need_other_methods_or_a_password_are_refused(tmp_path: Path) -> None:
    folder = saved_adapter(tmp_path)
    assert "deflated" in str(refused(zipped(folder, tmp_path / "a.zip", method=zipfile.ZIP_LZMA)))
    path = zipped(folder, tmp_path / "b.zip", method=zipfile.ZIP_STORED)
    data = bytearray(path.read_bytes())
    at = data.find(b"PK\x01\x02")
    while at >= 0:
        data[at + 8] |= 1
        at = data.find(b"PK\x01\x02", at + 4)
    path.write_bytes(data)
    assert "unencrypted" in str(refused(path))


def test_only_adapter_zips_look_like_one(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(1)}, buffer)
    for data in (b"", b"PK\x03\x04", b"PK\x05\x06" + bytes(18), b"text", buffer.getvalue()):
        (tmp_path / "f").write_bytes(data)
        assert not looks_like_peft_zip(tmp_path / "f")
    assert not looks_like_peft_zip(tmp_path / "none")
    assert not looks_like_peft_zip(tmp_path)
    with zipfile.ZipFile(tmp_path / "f", "w") as archive:
        archive.writestr("x/adapter_config.json.txt", "{}")
    assert not looks_like_peft_zip(tmp_path / "f")


def test_damaged_zips_are_refused_and_never_crash(tmp_path: Path) -> None:
    spec = spec_of(tiny_llama())
    folder = saved_adapter(tmp_path)
    path = tmp_path / "a.zip"
    whole = [zipped(folder, path, "x/", method).read_bytes() for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)]
    dice = random.Random(0)
    outcomes = set()
    for _ in range(1500):
        data = bytearray(dice.choice(whole))
        for _ in range(dice.randint(1, 3)):
            # Mostly where the structure is: at the start, and in the directory at the end.
            position = dice.choice([dice.randrange(len(data)), dice.randrange(60), -dice.randrange(1, 300)])
            data[position] = dice.randrange(256)
        path.write_bytes(data[: dice.choice([len(data), len(data), dice.randrange(len(data))])])
        looks_like_peft_zip(path)
        try:
            import_peft(path, spec, MAX_BYTES)
            outcomes.add("read")
        except SoftPromptError as error:
            outcomes.add(error.code)
    assert "invalid_file" in outcomes
