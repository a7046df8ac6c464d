"""gpt-oss with experts in MXFP4: computed from their blocks, equal to transformers with all of them widened."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GptOssConfig
from transformers.integrations.mxfp4 import convert_moe_packed_tensors
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from softbatch.prompt_store.fingerprint import fingerprint
from softbatch.scheduler.model import block_experts, gguf_conversion, gguf_gpt_oss, loader
from softbatch.scheduler.model.batch import Row
from softbatch.scheduler.model.block_experts import BlockExperts
from softbatch.scheduler.model.cpu import ops
from softbatch.scheduler.model.cpu.build import build as build_kernels
from softbatch.scheduler.model.cpu.formats import BlockKind
from softbatch.scheduler.model.loader import Loaded, load
from softbatch.scheduler.model.mxfp4 import from_gguf_rows, gguf_rows, widened
from softbatch.scheduler.model.source import EMBEDDED_ALIAS, ModelError, resolve
from softbatch.scheduler.protocol import EngineConfig
from softbatch.server.compressions import session
from softbatch.server.compressions.prepare import ModelFiles, PreparedRun
from softbatch.server.compressions.request import InputError, ModelChoice, make_request, make_settings
from softbatch.server.compressions.session import CompressionSession
from tests.support.families import edit_weights
from tests.support.models import Reference, in_threads, load_reference
from tests.support.mxfp4_models import SIZES, change_config, save_as_gguf, save_in_mxfp4

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
CHUNKS = (1, 9, 30, 1, 1, 18, 1)


@pytest.fixture(autouse=True, scope="module")
def kernels() -> None:
    assert build_kernels()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """transformers widens it as it loads it."""
    path = save_in_mxfp4(tmp_path_factory.mktemp("mxfp4") / "gpt-oss", resolve(EMBEDDED_ALIAS).path)
    return load_reference(str(path))


def random_bytes(*shape: int, seed: int = 0, low: int = 0, high: int = 256) -> torch.Tensor:
    return torch.randint(low, high, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def test_values_are_those_of_transformers_and_gguf() -> None:
    """Bit for bit, of every byte and of scales up to the ends."""
    blocks, scales = random_bytes(3, 40, 5, 16), random_bytes(3, 40, 5, seed=1, high=250)
    blocks[0, :16, 0] = torch.arange(256, dtype=torch.uint8).view(16, 16)
    scales[0, 0] = torch.tensor([0, 1, 2, 127, 249])
    found = widened(blocks, scales)
    assert torch.equal(found, convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).mT)
    rows = gguf_rows(blocks, scales)
    assert torch.equal(found, torch.from_numpy(gguf.dequantize(rows.numpy(), gguf.GGMLQuantizationType.MXFP4)))
    assert torch.equal(found.flatten(0, 1), ops.dequantize_blocks(rows.flatten(0, 1), BlockKind.MXFP4))
    again = from_gguf_rows(rows)
    assert torch.equal(again[0], blocks)
    assert torch.equal(again[1], scales)


@torch.inference_mode()
def test_experts_equal_those_of_transformers() -> None:
    """Before they are left to the kernels and behind that, where gates are cut off too; a row is the same bit for bit
    whoever shares its step."""
    generator = torch.Generator().manual_seed(3)
    config = GptOssConfig(**(SIZES | {"num_hidden_layers": 1}))
    experts = GptOssExperts(config).float()
    own = BlockExperts(experts)
    for name in ("gate_up_proj", "down_proj"):
        getattr(own, f"{name}_blocks").copy_(random_bytes(*getattr(own, f"{name}_blocks").shape))
        getattr(own, f"{name}_scales").copy_(random_bytes(*getattr(own, f"{name}_scales").shape, low=123, high=128))
        values = widened(getattr(own, f"{name}_blocks"), getattr(own, f"{name}_scales"))
        getattr(experts, name).copy_(values.mT)
        bias = getattr(experts, f"{name}_bias")
        bias.copy_(torch.randn(bias.shape, generator=generator))
    x = torch.randn(70, SIZES["hidden_size"], generator=generator)
    scores = torch.randn(70, SIZES["num_local_experts"], generator=generator)
    weights, chosen = scores.topk(3)
    expected = experts(x, chosen, weights)
    scale = expected.abs().amax()
    assert (own(x, chosen, weights) - expected).abs().amax() < 1e-5 * scale
    block_experts.pack_experts(own)
    assert not list(own.parameters())
    whole = own(x, chosen, weights)
    assert (whole - expected).abs().amax() < 1e-4 * scale
    with in_threads(3):
        assert torch.equal(own(x, chosen, weights), whole)
    for rows in (1, 2, 17, 65):
        assert torch.equal(own(x[:rows], chosen[:rows], weights[:rows]), whole[:rows])
    assert own(x[:0], chosen[:0], weights[:0]).shape == (0, SIZES["hidden_size"])
    in_bfloat16 = own(x.bfloat16(), chosen, weights.bfloat16())
    assert in_bfloat16.dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match="there is no expert 9"):
        own(x, chosen.clone().fill_(9), weights)


def loaded(model: Path | str, **options: Any) -> tuple[Loaded, dict[str, str]]:
    phases: dict[str, str] = {}
    given: dict[str, Any] = {"model": str(model), "kv_cache_gib": 0.01, "dtype": "float32", "max_model_len": 128}
    return load(EngineConfig(**(given | options)), lambda phase, _, detail: phases.update({phase: detail})), phases


def log_probabilities(model: Loaded, sequences: Sequence[Sequence[int]]) -> torch.Tensor:
    """[sequences, tokens, vocab] in chunks."""
    size, start, found = model.kv_cache.block_size, 0, []
    blocks = -(-sum(CHUNKS) // size)
    for count in CHUNKS:
        rows = [
            Row(start, tokens[start : start + count], list(range(blocks * n, blocks * (n + 1))), range(count))
            for n, tokens in enumerate(sequences)
        ]
        found.append(model.runner.forward(rows).float().view(len(sequences), count, -1).clone())
        start += count
    return torch.cat(found, 1).log_softmax(-1)


def some_sequences() -> list[list[int]]:
    rng = random.Random(2)
    return [[rng.randrange(3, 512) for _ in range(sum(CHUNKS))] for _ in range(2)]


def assert_is(model: Loaded, reference: Any) -> None:
    """As exact as any model in float32."""
    sequences = some_sequences()
    with torch.inference_mode():
        expected = reference(torch.tensor(sequences)).logits.log_softmax(-1)
    found = log_probabilities(model, sequences)
    assert torch.equal(found.argmax(-1), expected.argmax(-1))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)


def test_a_checkpoint_is_served_from_its_blocks(checkpoint: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    """With both values of --quantization that leave weights as they are; never is more than one matrix of one expert
    widened."""
    most = 0

    def watched(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        nonlocal most
        found = widened(blocks, scales)
        most = max(most, found.numel())
        return found

    monkeypatch.setattr(block_experts, "widened", watched)
    for quantization in ("none", "native"):
        model, phases = loaded(checkpoint.path, quantization=quantization)
        assert "experts computed from their blocks (MXFP4)" in phases["weight layout"]
        assert_is(model, checkpoint.model)
        assert model.info.num_parameters == sum(weight.numel() for weight in checkpoint.model.parameters())
    assert most == SIZES["hidden_size"] * 2 * SIZES["intermediate_size"]


def test_soft_prompts_fit_the_widened_model_too(checkpoint: Reference) -> None:
    model, _ = loaded(checkpoint.path, dtype="bfloat16")
    assert model.info.fingerprint == fingerprint(checkpoint.model, checkpoint.tokenizer)


def test_without_kernels_experts_are_widened_one_by_one(checkpoint: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_experts, "build_kernels", lambda: False)
    model, _ = loaded(checkpoint.path)
    assert_is(model, checkpoint.model)
    with pytest.raises(ModelError, match=r"--quantization native takes a C\+\+ compiler: use --quantization none"):
        loaded(checkpoint.path, quantization="native")


@pytest.mark.parametrize(("change", "said"), [
    ({"hidden_size": 72}, r"config\.json: hidden_size is 72, but experts in MXFP4 .* take a multiple of 32"),
    ({"intermediate_size": 80}, r"config\.json: intermediate_size is 80, but experts in MXFP4"),
    ({"intermediate_size": 64}, r"down_proj_blocks is \[.*\] in the file and \[.*\] by config\.json"),
])  # fmt: skip
def test_other_sizes_are_refused(checkpoint: Reference, tmp_path: Path, change: dict[str, Any], said: str) -> None:
    path = shutil.copytree(checkpoint.path, tmp_path / "other")
    change_config(path, **change)
    with pytest.raises(ModelError, match=said):
        loaded(path)


@pytest.mark.parametrize("options", [{"quantization": "int8"}, {"kv_cache_dtype": "k6v4"}, {"deterministic": True}])
def test_options_of_the_decoder_are_refused_before_weights_are_read(
    checkpoint: Reference, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "read_model", lambda *_: pytest.fail("the weights were read"))
    named = next(iter(options)).replace("_", "-")
    with pytest.raises(ModelError, match=f"--{named}.* takes .*; this is GptOssForCausalLM in float32 on cpu"):
        loaded(checkpoint.path, **options)


@pytest.mark.parametrize("options", [{"quantization": "int8"}, {"kv_cache_dtype": "k6v4"}, {"deterministic": True}])
def test_they_are_refused_before_a_gguf_file_is_converted(
    checkpoint: Reference, tmp_path: Path, cache: None, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_gpt_oss, "convert", lambda *_: pytest.fail("the file was converted"))
    with pytest.raises(ModelError, match=r"takes .*; this is GptOssForCausalLM in float32 on cpu"):
        loaded(save_as_gguf(tmp_path / "a.gguf", Path(checkpoint.path)), **options)


def test_a_compression_is_refused_before_the_model_is_read(
    checkpoint: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "LocalEngine", lambda *_: pytest.fail("the model was read"))
    files = ModelFiles.open(ModelChoice(checkpoint.path, dtype="float32"))
    context = files.context("Winter is cold. " * 20, None, 16)
    with pytest.raises(ValueError, match="attention has sinks"):
        CompressionSession.open(files, context, 1 << 20)
    request = make_request(
        name="a",
        context="Winter is cold. " * 20,
        settings=make_settings(),
        questions=(),
        choice=lambda: files.choice,
        store=tmp_path,
        max_prompt_bytes=1 << 20,
    )
    with pytest.raises(InputError, match="attention has sinks"):
        PreparedRun.checked(request, files, tmp_path, 1 << 20)


def test_a_gguf_file_ends_at_each_of_its_end_tokens(
    checkpoint: Reference, tmp_path: Path, cache: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    vocabulary = checkpoint.tokenizer.get_vocab()
    others = sorted(vocabulary, key=lambda token: vocabulary[token])[300:302]
    monkeypatch.setattr(gguf_conversion, "_ENDS_OF_GPT_OSS", (*others, "<|call|>"))
    directory = Path(resolve(str(save_as_gguf(tmp_path / "a.gguf", Path(checkpoint.path)))).path)
    said = json.loads((directory / "generation_config.json").read_text())["eos_token_id"]
    assert set(said) >= {vocabulary[token] for token in others}


def test_a_checkpoint_without_scales_is_refused(checkpoint: Reference, tmp_path: Path) -> None:
    path = shutil.copytree(checkpoint.path, tmp_path / "half")
    edit_weights(path, lambda weights: {name: each for name, each in weights.items() if not name.endswith("_scales")})
    with pytest.raises(ModelError, match=r"the file lacks model\.layers\.0\.mlp\.experts\.down_proj_scales and 3 more"):
        loaded(path)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_a_gguf_file_is_served_from_its_blocks(checkpoint: Reference, tmp_path: Path, cache: None) -> None:
    """Its conversion has the blocks of the checkpoint that it was made of, and what the file leaves out."""
    file = save_as_gguf(tmp_path / "a.gguf", Path(checkpoint.path))
    model, phases = loaded(file)
    assert "experts computed from their blocks (MXFP4)" in phases["weight layout"]
    directory = Path(resolve(str(file)).path)
    weights = {name: each for part in directory.glob("*.safetensors") for name, each in load_file(part).items()}
    original = load_file(Path(checkpoint.path) / "model.safetensors")
    assert weights.keys() == original.keys()
    for name, weight in original.items():
        assert torch.equal(weights[name], weight if weight.dtype == torch.uint8 else weight.bfloat16()), name
    found = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    assert found.config.rope_parameters == checkpoint.model.config.rope_parameters
    assert found.config.layer_types == checkpoint.model.config.layer_types
    assert_is(model, found)
    with pytest.raises(ModelError, match=r"this is GptOssForCausalLM .*: use --quantization none, which keeps experts"):
        loaded(file, quantization="native")


def test_a_gguf_file_of_another_kind_is_widened(checkpoint: Reference, tmp_path: Path, cache: None) -> None:
    file = save_as_gguf(tmp_path / "a.gguf", Path(checkpoint.path), BlockKind.Q8_0)
    model, phases = loaded(file)
    assert "MXFP4" not in phases["weight layout"]
    assert_is(model, AutoModelForCausalLM.from_pretrained(resolve(str(file)).path, dtype=torch.float32).eval())
    expected, found = (log_probabilities(each, some_sequences()) for each in (loaded(checkpoint.path)[0], model))
    assert (found - expected).abs().mean() < 0.1  # the same matrices, if less exactly


@pytest.mark.parametrize(("said", "refusal"), [
    ({"rope.scaling.yarn_beta_fast": 32.0, "rope.scaling.yarn_beta_slow": 1.0}, None),
    ({"rope.scaling.yarn_log_multiplier": 0.1}, r"gpt-oss\.rope\.scaling\.yarn_log_multiplier, which is not supported"),
    ({"expert_count": 7}, r"down_proj_bias is \[8, 64\] in the file and \[7, 64\] by config\.json"),
    ({"expert_used_count": 0}, r"gpt-oss\.expert_used_count is 0, and must lie between 1 and 8"),
    ({"expert_used_count": 9}, r"gpt-oss\.expert_used_count is 9, and must lie between 1 and 8"),
    ({"block_count": 2**32 - 1}, r"gpt-oss\.block_count is 4294967295, and must lie between 1 and"),
    ({"block_count": 3}, r"the file lacks blk\.2\.attn_norm\.weight"),
    ({"block_count": 1}, r"the file has blk\.1\.attn_k\.bias, which the model that its metadata describes has not"),
])  # fmt: skip
def test_a_gguf_file_is_read_strictly(
    checkpoint: Reference, tmp_path: Path, cache: None, said: dict[str, Any], refusal: str | None
) -> None:
    file = save_as_gguf(tmp_path / "a.gguf", Path(checkpoint.path), **said)
    if refusal is None:
        assert_is(loaded(file)[0], AutoModelForCausalLM.from_pretrained(resolve(str(file)).path, dtype=torch.float32))
    else:
        with pytest.raises(ModelError, match=refusal):
            loaded(file)
