"""Real checkpoints (make test-models): a few layers' worth of luck does not make them right."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.checkpoints import GEMMA, QWEN, Checkpoint, fetch
from softbatch.prompt_store.compression.frozen.frozen_model import Decoder
from softbatch.scheduler.model.batch import Row
from softbatch.scheduler.model.loader import load
from softbatch.scheduler.model.source import resolve
from softbatch.scheduler.protocol import EngineConfig
from tests.support.servers import PROJECT

pytestmark = [pytest.mark.checkpoint, pytest.mark.timeout(900)]
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


@pytest.mark.parametrize(("checkpoint", "of_k6v4"), [(QWEN, 0.01), (GEMMA, 0.02)], ids=["qwen", "gemma"])
def test_packed_caches_stay_near(checkpoint: Checkpoint, of_k6v4: float) -> None:
    """Qwen's keys have biases many times as large as the rest of a key; Gemma's have norms instead. In chunks, and the
    last tokens one by one, as they would be decoded."""
    path = str(fetch(checkpoint))
    source = resolve(path)
    tokens = source.tokenizer((PROJECT / "examples/manual/context.md").read_text())["input_ids"][:448]
    reference = AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32)
    with torch.inference_mode():
        expected = reference(torch.tensor([tokens]), use_cache=False).logits[0].log_softmax(-1)
    del reference
    starts = [*range(0, 384, 128), *range(384, len(tokens))]
    for kv_format, allowed in (("int8", 0.0005), ("k6v4", of_k6v4)):
        config = EngineConfig(
            model=path, dtype="bfloat16", device="cpu", kv_cache_gib=0.1, kv_cache_dtype=kv_format, max_model_len=512
        )
        loaded = load(config, lambda *_: None)
        divergence = 0.0
        blocks = list(range(-(-len(tokens) // loaded.kv_cache.block_size)))
        for start, end in pairwise([*starts, len(tokens)]):
            row = Row(start, tokens[start:end], blocks, range(end - start))
            with torch.inference_mode():
                found, wanted = loaded.runner.forward([row]).float().log_softmax(-1), expected[start:end]
            divergence += float((wanted.exp() * (wanted - found)).sum())
        assert divergence / len(tokens) < allowed, kv_format
