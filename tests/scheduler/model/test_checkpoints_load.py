"""Real checkpoints (make test-models): a few layers' worth of luck does not make them right."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.checkpoints import GEMMA, QWEN, Checkpoint, fetch
from softbatch.prompt_store.compression.frozen.frozen_model import Decoder
from softbatch.scheduler.model.batch import Row
from softbatch.scheduler.model.loader import load
from softbatch.scheduler.model.source import ModelError, resolve
from softbatch.scheduler.protocol import EngineConfig

pytestmark = pytest.mark.checkpoint
TEXT = "def fibonacci(n):\n    if n < 2:\n        return n\n    return fibonacci(n - 1) + fibonacci(n - 2)\n"


@pytest.mark.parametrize("checkpoint", [QWEN, GEMMA], ids=lambda checkpoint: checkpoint.name)
def test_log_probabilities_are_those_of_transformers(checkpoint: Checkpoint) -> None:
    config = EngineConfig(
        model=str(fetch(checkpoint)), dtype="float32", device="cpu", kv_cache_gib=0.1, max_model_len=512
    )
    loaded = load(config, lambda *_: None)
    path = loaded.info.tokenizer_path
    reference = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    tokens = resolve(path).tokenizer.encode(TEXT * 8)[:400]
    blocks = list(range(-(-len(tokens) // loaded.kv_cache.block_size)))
    with torch.inference_mode():
        found = loaded.runner.forward([Row(0, tokens, blocks, range(len(tokens)))]).log_softmax(-1)
        expected = reference(torch.tensor([tokens])).logits[0].log_softmax(-1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)


def test_qwen_passes_both_checks_in_bfloat16() -> None:
    config = EngineConfig(model=str(fetch(QWEN)), dtype="bfloat16", device="cpu", kv_cache_gib=0.1)
    loaded = load(config, lambda *_: None)
    assert loaded.info.eos_token_ids[0] == resolve(loaded.info.tokenizer_path).tokenizer.convert_tokens_to_ids(
        "<|im_end|>"
    )
    Decoder(AutoModelForCausalLM.from_pretrained(loaded.info.tokenizer_path, dtype=torch.bfloat16))


def test_gemma_is_refused_beyond_its_window() -> None:
    with pytest.raises(ModelError, match="--max-model-len 512 serves it"):
        load(EngineConfig(model=str(fetch(GEMMA)), device="cpu"), lambda *_: None)


def test_qwen_keeps_its_cache_in_8_bits() -> None:
    """On text this costs it thousandths of a nat; over tokens that no text has, it would be refused."""
    config = EngineConfig(
        model=str(fetch(QWEN)), dtype="bfloat16", device="cpu", kv_cache_gib=0.1, kv_cache_dtype="int8"
    )
    assert load(config, lambda *_: None).kv_cache
