"""Small models of each architecture, and steps of the decoder in C++ on them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GraniteConfig,
    LlamaConfig,
    MinistralConfig,
    MistralConfig,
    Olmo2Config,
    Olmo3Config,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from softbatch.scheduler.model import transformers_attention as interface
from softbatch.scheduler.model.batch import Row, build_batch
from softbatch.scheduler.model.cpu.build import build as build_kernels
from softbatch.scheduler.model.cpu.formats import KvFormat, WeightFormat
from softbatch.scheduler.model.kv_cache import KVCache
from softbatch.scheduler.model.llama.decoder import DecoderForward, supports
from softbatch.scheduler.model.llama.description import key_offsets_of
from tests.support.gguf_blocks import in_blocks

CPU = torch.device("cpu")
BLOCKS = 160
VOCAB = 150  # fills no panel of outputs
SIZES: dict[str, Any] = {"vocab_size": VOCAB, "num_hidden_layers": 3, "max_position_embeddings": 512}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
HEADS: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2}
SMALL: dict[str, Any] = SIZES | HEADS | {"hidden_size": 64, "intermediate_size": 96, "pad_token_id": 0}
GEMMA: dict[str, Any] = SMALL | {"head_dim": 24, "query_pre_attn_scalar": 20, "sliding_window": 24}
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
# Sizes on both sides of vectors and panels; grouped heads; biases; norms of heads; heads wider than the model.
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_attention_heads=8,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        **SIZES,
    ),
    "llama3 rope, biases": LlamaConfig(
        hidden_size=60,
        intermediate_size=100,
        num_attention_heads=3,
        num_key_value_heads=3,
        attention_bias=True,
        rope_parameters=LLAMA3_ROPE,
        **SIZES,
    ),
    "mistral": MistralConfig(
        hidden_size=96, intermediate_size=72, num_attention_heads=6, num_key_value_heads=1, sliding_window=None, **SIZES
    ),
    "qwen2": Qwen2Config(hidden_size=64, intermediate_size=132, num_attention_heads=4, num_key_value_heads=2, **SIZES),
    "qwen3": Qwen3Config(
        hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, head_dim=40, **SIZES
    ),
    "gemma": GemmaConfig(head_dim=24, **SMALL),
    "gemma2": Gemma2Config(attn_logit_softcapping=3.0, final_logit_softcapping=4.0, layer_types=MIXED, **GEMMA),
    "gemma3": Gemma3TextConfig(layer_types=MIXED, **GEMMA),
    "granite": GraniteConfig(
        embedding_multiplier=3.0, residual_multiplier=0.3, attention_multiplier=0.4, logits_scaling=2.5, **SMALL
    ),
    "ministral": MinistralConfig(sliding_window=24, layer_types=MIXED, head_dim=16, **SMALL),
    "mistral, window": MistralConfig(sliding_window=17, **SMALL),
    "olmo2": Olmo2Config(**SMALL),
    "olmo3": Olmo3Config(sliding_window=24, layer_types=MIXED, **SMALL),
    "phi3": Phi3Config(sliding_window=None, **SMALL),
    "phi3, partial rotary": Phi3Config(sliding_window=30, partial_rotary_factor=0.5, **SMALL),
    "qwen2, windows": Qwen2Config(sliding_window=20, use_sliding_window=True, max_window_layers=1, **SMALL),
    "smollm3": SmolLM3Config(no_rope_layers=[1, 0, 1], **SMALL),
}
LIKE_LLAMA = ("llama", "llama3 rope, biases", "mistral", "phi3", "qwen2")  # what training kernels know,
WITH_WINDOWS = ("ministral", "mistral, window", "qwen2, windows")  # and these, whose attention is not theirs


def make_model(config: PreTrainedConfig, dtype: torch.dtype) -> Any:
    interface.register()
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=interface.ATTENTION_NAME)
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms too: at their initial values they would not show
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.15)
    return model.to(dtype).eval().requires_grad_(False)


def make_cache(
    model: Any, dtype: torch.dtype, num_blocks: int = BLOCKS, kv_format: KvFormat = KvFormat.PLAIN
) -> KVCache:
    """Whoever reads what was not written reads NaN: bytes of 255 are one too, as the scale of a packed row."""
    config, attention = model.config, model.model.layers[0].self_attn
    cache = KVCache(
        num_layers=config.num_hidden_layers,
        num_blocks=num_blocks,
        num_kv_heads=config.num_key_value_heads,
        block_size=16,
        head_dim=attention.head_dim,
        dtype=dtype,
        device=CPU,
        kv_format=kv_format,
        key_offsets=key_offsets_of(model),
    )
    for tensor in (*cache.keys, *cache.values):
        tensor.fill_(float("nan") if kv_format is KvFormat.PLAIN else 255)
    return cache


def make_decoder(name: str, weights: WeightFormat) -> DecoderForward:
    dtype = torch.float32 if weights is WeightFormat.FLOAT32 else torch.bfloat16
    return decoder_of(make_model(CONFIGS[name], dtype), weights)


def decoder_of(model: Any, weights: WeightFormat) -> DecoderForward:
    assert supports(model, model.dtype)
    assert build_kernels()
    if weights is WeightFormat.GGUF_BLOCKS:
        return DecoderForward(model, make_cache(model, model.dtype), blocks=in_blocks(model))
    try:
        return DecoderForward(model, make_cache(model, model.dtype), weights)
    except RuntimeError as error:
        if weights is WeightFormat.BFLOAT16_IN_12_BITS and "cannot be bfloat16 in 12 bits here" in str(error):
            pytest.skip("the processor has no instructions for it")
        raise


def make_rows(steps: Sequence[tuple[int, int]], seed: int = 0, logits: bool = True) -> list[Row]:
    """Sequences in scattered blocks: the row of sequence s computes `count` tokens from `start` on."""
    generator = torch.Generator().manual_seed(seed)
    rows, blocks = [], iter(torch.randperm(BLOCKS, generator=generator).tolist())
    for start, count in steps:
        table = [next(blocks) for _ in range(-(-(start + count) // 16))]
        tokens = torch.randint(VOCAB, (start + count,), generator=generator).tolist()
        rows.append(Row(start, tokens[start:], table, range(count - 1, count) if logits else range(count)))
    return rows


def prefix(rows: Sequence[Row], seed: int = 0) -> list[Row]:
    """What has to be computed before `rows`: the tokens in front of each."""
    generator = torch.Generator().manual_seed(seed)
    torch.randperm(BLOCKS, generator=generator)
    found = []
    for row in rows:
        tokens = torch.randint(VOCAB, (row.start + row.count,), generator=generator).tolist()
        if row.start:
            found.append(Row(0, tokens[: row.start], row.block_table, range(0)))
    return found


@torch.inference_mode()
def run(forward: Any, steps: Sequence[tuple[int, int]], seed: int = 0) -> torch.Tensor:
    rows = make_rows(steps, seed)
    before = prefix(rows, seed)
    if before:
        assert forward(build_batch(before, 16, CPU)).shape == (0, VOCAB)
    return forward(build_batch(rows, 16, CPU)).clone()


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / (expected.double() - expected.double().mean()).norm())


@torch.inference_mode()
def closeness(forward: Any, tokens: list[int], expected: torch.Tensor) -> tuple[float, float]:
    """KL to float32, mean of all positions, and how often the most probable token is the same; in three chunks."""
    found = []
    for start in range(0, len(tokens), 200):
        part = tokens[start : start + 200]
        found.append(forward(build_batch([Row(start, part, list(range(32)), range(len(part)))], 16, CPU)).clone())
    own = torch.cat(found).float().log_softmax(-1)
    kl = (expected.exp() * (expected - own)).sum(-1).mean()
    return float(kl), float((own.argmax(-1) == expected.argmax(-1)).float().mean())
