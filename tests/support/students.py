"""A tiny model in float64 and random soft prompts for it."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from softbatch.prompt_store.compression.frozen.frozen_model import Decoder
from softbatch.prompt_store.compression.frozen.prefix import Prefix


def double_llama() -> Decoder:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    model = LlamaForCausalLM(config).double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
    return Decoder(model)


def random_prefix(decoder: Decoder, length: int, seed: int = 0) -> Prefix:
    shape = decoder.geometry
    generator = torch.Generator().manual_seed(seed)
    size = (shape.layers, length, shape.kv_heads, shape.head_dim)
    return Prefix(*(torch.randn(size, generator=generator, dtype=decoder.dtype) for _ in range(2)))
