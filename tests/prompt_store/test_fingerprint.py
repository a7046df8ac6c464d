"""Two models share a fingerprint exactly when their soft prompts can be exchanged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import normalizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from softbatch.prompt_store.soft_prompt_file import fingerprint
from tests.support.soft_prompt_samples import byte_tokenizer, tiny_llama

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    tiny_llama(tie_word_embeddings=True).save_pretrained(path)
    byte_tokenizer(TEMPLATE).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> str:
    return fingerprint(tiny_llama(tie_word_embeddings=True), byte_tokenizer(TEMPLATE))


def test_it_is_a_sha256_and_does_not_depend_on_how_the_checkpoint_is_loaded(checkpoint: Path, reference: str) -> None:
    assert len(reference) == 64
    int(reference, 16)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    for dtype in (torch.float32, torch.bfloat16):
        for attention in ("eager", "sdpa"):
            model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype, attn_implementation=attention)
            model.config._name_or_path = f"somewhere/{attention}"
            model.config.transformers_version = "0.0.0"
            model.config.use_cache = attention == "eager"
            assert fingerprint(model, tokenizer) == reference
            assert fingerprint(model.train(), tokenizer) == reference


def test_a_float32_checkpoint_and_its_bfloat16_copy_share_it(tmp_path: Path, reference: str) -> None:
    tiny_llama(tie_word_embeddings=True).bfloat16().save_pretrained(tmp_path)
    assert fingerprint(AutoModelForCausalLM.from_pretrained(tmp_path), byte_tokenizer(TEMPLATE)) == reference


def test_rounding_of_config_numbers_does_not_matter(reference: str) -> None:
    model = tiny_llama(tie_word_embeddings=True)
    model.config.rms_norm_eps = 9.999999974752427e-07
    model.config.rope_parameters = {**model.config.rope_parameters, "rope_theta": 10000}
    assert fingerprint(model, byte_tokenizer(TEMPLATE)) == reference


def change_weights(model: LlamaForCausalLM) -> None:
    model.model.layers[2].mlp.down_proj.weight.data += 0.1


def change_one_norm(model: LlamaForCausalLM) -> None:
    model.model.norm.weight.data *= 1.1


def change_rope(model: LlamaForCausalLM) -> None:
    model.config.rope_parameters = {**model.config.rope_parameters, "rope_theta": 500000.0}


def change_activation(model: LlamaForCausalLM) -> None:
    model.config.hidden_act = "gelu"


def change_heads(model: LlamaForCausalLM) -> None:
    model.config.num_attention_heads = 8


@pytest.mark.parametrize("change", [change_weights, change_one_norm, change_rope, change_activation, change_heads])
def test_another_model_has_another_one(change: Callable[[LlamaForCausalLM], None], reference: str) -> None:
    model = tiny_llama(tie_word_embeddings=True)
    change(model)
    assert fingerprint(model, byte_tokenizer(TEMPLATE)) != reference


def test_another_tokenizer_has_another_one(reference: str) -> None:
    model = tiny_llama(tie_word_embeddings=True)
    assert fingerprint(model, byte_tokenizer(TEMPLATE + " ")) != reference
    assert fingerprint(model, byte_tokenizer(TEMPLATE, bos_token="<bos>")) != reference
    more = byte_tokenizer(TEMPLATE)
    more.add_tokens(["extra"])
    assert fingerprint(model, more) != reference
    lower = byte_tokenizer(TEMPLATE)
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert fingerprint(model, lower) != reference


def test_padding_and_truncation_left_on_a_tokenizer_do_not_matter(reference: str) -> None:
    tokenizer = byte_tokenizer(TEMPLATE, pad_token="</s>")
    tokenizer(["a", "longer text"], padding=True, truncation=True, max_length=4)
    assert fingerprint(tiny_llama(tie_word_embeddings=True), tokenizer) == reference
