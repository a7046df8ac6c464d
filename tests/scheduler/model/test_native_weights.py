"""GGUF files served with their own weights: equal to transformers on what the file says, or refused by name."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from softbatch.scheduler.model import gguf_conversion
from softbatch.scheduler.model.batch import Row
from softbatch.scheduler.model.cpu.build import build as build_kernels
from softbatch.scheduler.model.cpu.formats import BlockKind, WeightFormat
from softbatch.scheduler.model.gguf_tensors import GgufTensors
from softbatch.scheduler.model.loader import Loaded, load
from softbatch.scheduler.model.source import ModelError, resolve
from softbatch.scheduler.protocol import EngineConfig
from tests.support.gguf_files import (
    BLOCK_SIZES,
    block_numbers,
    block_tensors,
    expert_numbers,
    expert_tensors,
    tensors,
    write_gguf,
)

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
PROMPT = [5, 300, 17, 44, 211, 9, 120, 33, 401]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert build_kernels()  # before there is no cache of them any more
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def gguf_of(directory: Path, *kinds: BlockKind) -> Path:
    weights, of_each = block_tensors(kinds)
    return write_gguf(directory / "a.gguf", block_numbers(), weights, block_kinds=of_each)


def loaded(file: Path, **options: Any) -> tuple[Loaded, dict[str, str]]:
    phases: dict[str, str] = {}
    given: dict[str, Any] = {"model": str(file), "kv_cache_gib": 0.01, "dtype": "float32"} | options
    config = EngineConfig(**given)
    return load(config, lambda phase, _, detail: phases.update({phase: detail})), phases


def greedy(model: Loaded, count: int) -> tuple[list[int], torch.Tensor]:
    """Tokens, and the logits that each was chosen by."""
    tokens, logits = list(PROMPT), []
    for step in range(count):
        start = 0 if step == 0 else len(tokens) - 1
        row = Row(start, tokens[start:], list(range(4)), range(len(tokens) - start - 1, len(tokens) - start))
        logits.append(model.runner.forward([row])[0].clone())
        tokens.append(int(logits[-1].argmax()))
    return tokens[len(PROMPT) :], torch.stack(logits)


@torch.inference_mode()
def reference(file: Path, count: int) -> tuple[list[int], torch.Tensor]:
    """transformers' own, in float32, with the file's exact values."""
    model = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, dtype=torch.float32).eval()
    tokens, logits = list(PROMPT), []
    for _ in range(count):
        logits.append(model(torch.tensor([tokens]), use_cache=False).logits[0, -1])
        tokens.append(int(logits[-1].argmax()))
    return tokens[len(PROMPT) :], torch.stack(logits)


@pytest.mark.parametrize(
    "kinds", [[kind] for kind in BlockKind] + [list(BlockKind)], ids=lambda kinds: "-".join(map(str, kinds))
)
def test_a_file_of_each_kind_equals_transformers(kinds: list[BlockKind], tmp_path: Path) -> None:
    """Greedy, token for token; where sums differ, by far less than the values' rounding to bfloat16 would."""
    file = gguf_of(tmp_path, *kinds)
    model, phases = loaded(file, quantization="native")
    assert str(WeightFormat.GGUF_BLOCKS) in phases["weight layout"]
    tokens, logits = greedy(model, 12)
    expected, exact = reference(file, 12)
    assert tokens == expected
    off = (logits - exact).norm() / exact.std() / exact.numel() ** 0.5
    assert off < 5e-4


def test_tensors_are_found_where_gguf_finds_them(tmp_path: Path) -> None:
    file = gguf_of(tmp_path, *BlockKind)
    found, reader = GgufTensors(file), GGUFReader(str(file))
    assert found.architecture == "llama"
    for tensor in reader.tensors:
        kind, number, rows = found.rows(tensor.name) or ("", 0, np.empty(0))
        assert (kind, number) == (tensor.tensor_type.name, tensor.tensor_type.value)
        assert np.array_equal(rows.reshape(-1), tensor.data.view(np.uint8).reshape(-1))
    assert found.rows("blk.9.attn_q.weight") is None


def test_in_bfloat16_they_are_nearer_to_the_file_than_when_widened(tmp_path: Path) -> None:
    """And soft prompts fit both: the model is the same."""
    file = gguf_of(tmp_path, BlockKind.Q4_K, BlockKind.Q5_0, BlockKind.Q6_K, BlockKind.Q8_0)
    _, exact = reference(file, 1)
    distances, fingerprints = [], []
    for quantization in ("native", "none"):
        model, _ = loaded(file, quantization=quantization, dtype="bfloat16")
        distances.append(float((greedy(model, 1)[1] - exact).norm()))
        fingerprints.append(model.info.fingerprint)
    assert distances[0] < distances[1]
    assert fingerprints[0] == fingerprints[1]


def test_what_the_kernels_cannot_compute_with_is_refused_before_the_conversion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By name, from the file's header: tensors that are no blocks, a family without a decoder, a dtype."""
    weights, kinds = block_tensors([BlockKind.Q8_0])
    plain = weights | {"blk.1.ffn_down.weight": np.zeros((BLOCK_SIZES[0], BLOCK_SIZES[1]), np.float16)}
    del kinds["blk.1.ffn_down.weight"]
    part = write_gguf(tmp_path / "part.gguf", block_numbers(), plain, block_kinds=kinds)
    experts = write_gguf(tmp_path / "experts.gguf", expert_numbers(), expert_tensors(), "qwen3moe")
    monkeypatch.setattr(gguf_conversion, "_convert", lambda *_: pytest.fail("the file was converted"))
    with pytest.raises(
        ModelError, match=r"native: its tensor blk\.1\.ffn_down\.weight is F16, and the kernels compute"
    ):
        loaded(part, quantization="native")
    with pytest.raises(
        ModelError, match=r"--quantization native takes .*; this is Qwen3MoeForCausalLM in float32 on cpu"
    ):
        loaded(experts, quantization="native")
    with pytest.raises(ModelError, match=r"this is LlamaForCausalLM in float16 on cpu: use --quantization none"):
        loaded(gguf_of(tmp_path, BlockKind.Q8_0), quantization="native", dtype="float16")


def test_what_is_no_file_of_blocks_is_refused_by_name(tmp_path: Path) -> None:
    """Also where the conversion is there already."""
    file = write_gguf(tmp_path / "plain.gguf", {}, tensors())
    directory = Path(resolve(str(file)).path)
    with pytest.raises(ModelError, match=r"native: its tensor blk\.0\.attn_q\.weight is F32, and the kernels compute"):
        loaded(file, quantization="native")
    with pytest.raises(ModelError, match=r"--quantization native takes a GGUF file, or .*, which --model .* is not"):
        loaded(directory, quantization="native")


def test_a_conversion_that_is_not_of_the_file_is_refused(tmp_path: Path) -> None:
    file = gguf_of(tmp_path, BlockKind.Q8_0)
    directory = Path(resolve(str(file)).path)
    weights = load_file(directory / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][7, 3] += 0.5
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight is not what the file's blocks say"):
        loaded(file, quantization="native")
