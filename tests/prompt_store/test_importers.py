"""An imported adapter makes plain transformers compute exactly what PEFT computes with it."""

from __future__ import annotations

import struct
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import DynamicCache, Gemma2Config, Gemma2ForCausalLM, PreTrainedModel

from softbatch.prompt_store.peft import CONFIG_NAME, WEIGHTS_NAME, import_peft
from softbatch.prompt_store.soft_prompt_file import SoftPrompt, SoftPromptError, check_fits, load, save
from softbatch.scheduler.model.weight_files import stored_weight
from tests.support.peft_samples import (
    ADAPTERS,
    CAUSAL,
    MODELS,
    TOKENS,
    N,
    edit_config,
    refused,
    saved_adapter,
    spec_of,
    train,
    zipped,
)
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


def test_a_byte_order_mark_in_front_of_the_config_is_passed_over(tmp_path: Path) -> None:
    folder = saved_adapter(tmp_path)
    (folder / CONFIG_NAME).write_bytes(b"\xef\xbb\xbf" + (folder / CONFIG_NAME).read_bytes())
    assert import_peft(folder, spec_of(tiny_llama()), MAX_BYTES).manifest.num_virtual_tokens == N


@pytest.mark.parametrize("shape", MODELS)
@pytest.mark.parametrize("name", ADAPTERS)
def test_logits_are_those_of_peft(name: str, shape: str, tmp_path: Path) -> None:
    model = tiny_llama(**MODELS[shape])
    with torch.no_grad():
        without = model(TOKENS).logits
        trained = train(model, name)
        expected = trained(TOKENS).logits
    trained.save_pretrained(tmp_path / "adapter")
    model = tiny_llama(**MODELS[shape])
    with torch.no_grad():
        reloaded = PeftModel.from_pretrained(model, tmp_path / "adapter").eval()(TOKENS).logits
    torch.testing.assert_close(reloaded, expected, atol=1e-5, rtol=0)

    prompt = import_peft(tmp_path / "adapter", spec_of(model), MAX_BYTES)
    actual = logits_with(tiny_llama(**MODELS[shape]), prompt)[:, -TOKENS.shape[1] :]
    torch.testing.assert_close(actual, expected[:, -TOKENS.shape[1] :], atol=1e-5, rtol=0)
    assert (actual - without).abs().max() > 0.01, "the prompt must have an effect to be compared"

    kind = name.split()[0]
    assert prompt.manifest.source == f"peft:{kind}"
    assert prompt.manifest.kind == ("kv" if kind in ("PREFIX_TUNING", "CARTRIDGE") else "embeddings")
    assert prompt.manifest.replaces == "nothing"
    assert prompt.manifest.num_virtual_tokens == N
    check_fits(prompt, spec_of(model))
    save(prompt, tmp_path / "p.safetensors")
    loaded = load(tmp_path / "p.safetensors", MAX_BYTES)
    assert all(torch.equal(loaded.tensors[key], tensor) for key, tensor in prompt.tensors.items())


def test_models_that_scale_their_embeddings_scale_no_soft_prompt(tmp_path: Path) -> None:
    """Gemma multiplies token embeddings by sqrt(hidden); PEFT's vectors enter behind that."""
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.2,
    )
    model = Gemma2ForCausalLM(config).eval()
    adapter = train(model, "PROMPT_TUNING")
    adapter.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = adapter(TOKENS).logits
    prompt = import_peft(tmp_path, spec_of(model), MAX_BYTES)
    torch.testing.assert_close(logits_with(model, prompt), expected, atol=1e-5, rtol=0)


def test_sizes_come_from_the_tensor_and_the_model_not_from_the_adapters_config(tmp_path: Path) -> None:
    folder = saved_adapter(tmp_path, "PREFIX_TUNING")
    before = import_peft(folder, spec_of(tiny_llama()), MAX_BYTES)
    edit_config(folder, num_virtual_tokens=99, token_dim=1, num_layers=77, num_attention_heads=5)
    after = import_peft(folder, spec_of(tiny_llama()), MAX_BYTES)
    assert torch.equal(before.tensors["keys"], after.tensors["keys"])


def test_adapters_that_are_no_soft_prompt_are_refused_by_name(tmp_path: Path) -> None:
    get_peft_model(tiny_llama(), LoraConfig(**CAUSAL, target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    error = refused(tmp_path / "lora")
    assert (error.code, error.param) == ("unsupported_adapter", "peft_type")
    assert "'LORA'" in str(error)
    assert "PREFIX_TUNING" in str(error)
    multitask = peft.MultitaskPromptTuningConfig(**CAUSAL, num_virtual_tokens=N, num_tasks=3)
    get_peft_model(tiny_llama(), multitask).save_pretrained(tmp_path / "multi")
    error = refused(tmp_path / "multi")
    assert (error.code, error.param) == ("unsupported_adapter", "peft_type")
    assert "one prompt per task" in str(error)


@pytest.mark.parametrize(
    ("changes", "code", "param"),
    [
        ({"peft_type": "NEW_TUNING"}, "unsupported_adapter", "peft_type"),
        ({"peft_type": None}, "unsupported_adapter", "peft_type"),
        ({"peft_type": ["CPT"]}, "unsupported_adapter", "peft_type"),
        ({"modules_to_save": ["lm_head"]}, "unsupported_adapter", "modules_to_save"),
        ({"task_type": "SEQ_2_SEQ_LM"}, "unsupported_adapter", "task_type"),
        ({"num_transformer_submodules": 2}, "unsupported_adapter", "task_type"),
        ({"peft_type": "PREFIX_TUNING"}, "wrong_shape", "prompt_embeddings"),
    ],
)
def test_configs_that_ask_for_more_than_a_soft_prompt_are_refused(
    tmp_path: Path, changes: dict[str, Any], code: str, param: str
) -> None:
    folder = saved_adapter(tmp_path)
    edit_config(folder, **changes)
    error = refused(folder)
    assert (error.code, error.param) == (code, param)


def test_an_adapter_that_saved_other_modules_is_refused_by_its_tensors_too(tmp_path: Path) -> None:
    folder = saved_adapter(tmp_path)
    adapter = train(tiny_llama(), "PROMPT_TUNING")
    adapter.save_pretrained(folder, save_embedding_layers=True)
    assert len(load_file(folder / WEIGHTS_NAME)) > 1
    assert refused(folder).code == "wrong_tensors"


def test_the_models_own_embedding_beside_the_prompt_is_no_hindrance(tmp_path: Path) -> None:
    """PEFT saves it after a vocabulary was resized."""
    model = tiny_llama()
    model.save_pretrained(tmp_path / "model")
    folder = saved_adapter(tmp_path, model=tiny_llama())
    train(tiny_llama(), "PROMPT_TUNING").save_pretrained(folder, save_embedding_layers=True)
    base = partial(stored_weight, str(tmp_path / "model"))
    assert import_peft(folder, spec_of(model), MAX_BYTES, base).manifest.num_virtual_tokens == N
    tensors = load_file(folder / WEIGHTS_NAME)
    name = next(name for name in tensors if "embed_tokens" in name)
    for other in (tensors[name] + 1, torch.cat([tensors[name], tensors[name][:1]])):
        save_file({**tensors, name: other.contiguous()}, folder / WEIGHTS_NAME)
        with pytest.raises(SoftPromptError, match="trained with another embedding") as caught:
            import_peft(folder, spec_of(model), MAX_BYTES, base)
        assert (caught.value.code, caught.value.param) == ("unsupported_adapter", name)


@pytest.mark.parametrize("changes", [{"hidden_size": 64}, {"name": "other", "hidden_size": 16}])
def test_another_width_names_both_sides(tmp_path: Path, changes: dict[str, Any]) -> None:
    spec = replace(spec_of(tiny_llama()), **changes)
    error = refused(saved_adapter(tmp_path), spec)
    assert (error.code, error.param) == ("wrong_shape", "prompt_embeddings")
    assert "32 wide" in str(error)
    assert str(spec.hidden_size) in str(error)


@pytest.mark.parametrize("changes", [{"num_layers": 2}, {"num_kv_heads": 4}, {"head_dim": 16}])
def test_a_prefix_of_another_geometry_is_refused(tmp_path: Path, changes: dict[str, int]) -> None:
    error = refused(saved_adapter(tmp_path, "PREFIX_TUNING"), replace(spec_of(tiny_llama()), **changes))
    assert (error.code, error.param) == ("wrong_shape", "prompt_embeddings")
    assert str(next(iter(changes.values()))) in str(error)


def test_weights_must_be_one_finite_float_matrix(tmp_path: Path) -> None:
    folder = saved_adapter(tmp_path)
    bad = torch.zeros(N, 32)
    bad[3, 4] = float("nan")
    for tensors, code in [
        ({"prompt_embeddings": bad}, "non_finite"),
        ({"prompt_embeddings": torch.zeros(N, 32, dtype=torch.int64)}, "wrong_dtype"),
        ({"prompt_embeddings": torch.zeros(N * 32)}, "wrong_shape"),
        ({"prompt_embeddings": torch.zeros(0, 32)}, "wrong_shape"),
        ({"prompt_embeddings": torch.zeros(65537, 32)}, "wrong_shape"),
        ({"embedding.weight": torch.zeros(N, 32)}, "wrong_tensors"),
        ({}, "wrong_tensors"),
    ]:
        save_file(tensors, folder / WEIGHTS_NAME)
        assert refused(folder).code == code
    for data in (b"", b"\x80\x04K\x01.", struct.pack("<Q", 1 << 60) + b"{}"):
        (folder / WEIGHTS_NAME).write_bytes(data)
        assert (refused(folder).code, refused(folder).param) == ("invalid_file", WEIGHTS_NAME)


def test_bin_weights_are_never_read(tmp_path: Path) -> None:
    folder = saved_adapter(tmp_path)
    (folder / WEIGHTS_NAME).unlink()
    torch.save({"prompt_embeddings": torch.zeros(N, 32)}, folder / "adapter_model.bin")
    for source in (
        folder,
        zipped(folder, tmp_path / "a.zip"),
        [folder / CONFIG_NAME, folder / "adapter_model.bin"],
    ):
        error = refused(source)
        assert error.code == "unsupported_adapter"
        assert "pickled" in str(error)


def test_missing_and_invalid_parts_are_named(tmp_path: Path) -> None:
    folder = saved_adapter(tmp_path)
    config, weights = folder / CONFIG_NAME, folder / WEIGHTS_NAME
    for paths in ([], [config], [config, config], [config, weights, weights]):
        assert refused(paths).code == "invalid_file"
    text = config.read_text()
    for data in (b"", b"[]", b"{", b"\xff\xfe", b"[" * 100_000):
        config.write_bytes(data)
        assert (refused(folder).code, refused(folder).param) == ("invalid_file", CONFIG_NAME)
    config.write_text(text + " " * (1 << 20))
    assert (refused(folder).code, refused(folder).param) == ("too_large", CONFIG_NAME)
    config.unlink()
    assert refused(folder).param == CONFIG_NAME
    config.write_text(text)
    weights.unlink()
    error = refused(folder)
    assert (error.code, error.param) == ("invalid_file", WEIGHTS_NAME)
    assert str(tmp_path) not in str(error)


def test_weights_over_the_limit_are_refused_however_they_arrive(tmp_path: Path) -> None:
    folder = saved_adapter(tmp_path)
    size = (folder / WEIGHTS_NAME).stat().st_size
    archive = zipped(folder, tmp_path / "a.zip")
    pair = [folder / CONFIG_NAME, folder / WEIGHTS_NAME]
    for source in (folder, archive, pair):
        import_peft(source, spec_of(tiny_llama()), size)
        error = refused(source, max_bytes=size - 1)
        assert (error.code, error.param) == ("too_large", WEIGHTS_NAME)
