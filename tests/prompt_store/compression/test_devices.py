"""Compression runs where its model lies: no tensor is left to the default device, and a GPU gives a CPU's result."""

from __future__ import annotations

import ast
import copy
import json
from pathlib import Path

import pytest
import torch

from softbatch.prompt_store.compression.compression_settings import CompressionSettings
from softbatch.prompt_store.compression.frozen.frozen_model import Decoder
from softbatch.prompt_store.compression.frozen.tokenized_context import TokenizedContext
from softbatch.prompt_store.compression.pace import Stopped
from softbatch.prompt_store.compression.pipeline import Compression
from tests.support.models import Reference
from tests.support.small_compressions import CONTEXT, SMALL, engine

FACTORIES = {"tensor", "arange", "zeros", "ones", "empty", "full", "eye", "linspace", "rand", "randn", "randint"}
SOURCES = sorted((Path(__file__).parents[3] / "prompt_store" / "compression").rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_every_tensor_is_made_on_a_named_device(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        owner = node.func.value
        if isinstance(owner, ast.Name) and owner.id == "torch" and node.func.attr in FACTORIES:
            assert any(word.arg == "device" for word in node.keywords), f"{path.name}:{node.lineno}"


def compression(llama: Reference, directory: Path, device: str, stop_after: int = 1 << 30, **options) -> Compression:
    decoder = Decoder(copy.deepcopy(llama.model), device)
    decoder.window = 4096
    calls = iter(range(1 << 30))
    settings = CompressionSettings(**(SMALL | options))
    return Compression(
        decoder,
        TokenizedContext(llama.tokenizer, CONTEXT, None, settings.max_answer_tokens, decoder.window),
        settings,
        engine(decoder),
        directory,
        should_stop=lambda: next(calls) >= stop_after,
    )


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["kv", "embeddings"])
def test_a_gpu_compresses_as_a_cpu_does_and_resumes(llama: Reference, tmp_path: Path, kind: str) -> None:
    reports = {}
    for device in ("cpu", "cuda"):
        outcome = compression(llama, tmp_path / device, device, kind=kind).run()
        assert all(tensor.device.type == "cpu" for tensor in outcome.tensors.values())
        reports[device] = json.loads((tmp_path / device / "report.json").read_text())
    for name, scores in reports["cpu"]["baselines"].items():
        assert reports["cuda"]["baselines"][name]["kl"] == pytest.approx(scores["kl"], rel=1e-2, abs=1e-4)
    assert reports["cuda"]["kl"] == pytest.approx(reports["cpu"]["kl"], rel=0.05)
    with pytest.raises(Stopped):
        compression(llama, tmp_path / "cut", "cuda", stop_after=11, kind=kind).run()
    resumed = compression(llama, tmp_path / "cut", "cuda", kind=kind).run(resume=True)
    for name, tensor in outcome.tensors.items():
        torch.testing.assert_close(resumed.tensors[name], tensor, rtol=1e-3, atol=1e-4)
