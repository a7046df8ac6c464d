"""Models of real shapes with random weights, and a tokenizer that needs no download: for `gpu.py`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
SHAPES: dict[str, dict[str, Any]] = {
    "Llama-3.2-1B": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128_256,
        "tie_word_embeddings": True,
        "rope_parameters": ROPE | {"factor": 32.0},
    },
    "Llama-3.1-8B": {
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128_256,
        "rope_parameters": ROPE,
    },
    "SmolLM2-135M": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49_152,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100_000.0},
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
        "tie_word_embeddings": True,
    },
}


@dataclass(frozen=True)
class Costs:
    """What a step must at least move and compute: the floor beside which it is measured."""

    weight_bytes: int  # read by every step; of the input embeddings only the rows of its tokens are, which is nothing
    kv_bytes_per_token: int
    flops_per_token: int  # of the matrix products with weights, the output layer's left out
    attention_flops_per_pair: int  # of one query with one key, over all layers and heads

    @classmethod
    def of(cls, model: Any) -> Costs:
        config, layers = model.config, model.model.layers
        size = next(model.parameters()).element_size()
        in_layers = sum(parameter.numel() for parameter in layers.parameters())
        head_dim = layers[0].self_attn.head_dim
        return cls(
            weight_bytes=(in_layers + model.lm_head.weight.numel()) * size,
            kv_bytes_per_token=2 * len(layers) * config.num_key_value_heads * head_dim * size,
            flops_per_token=2 * in_layers,
            attention_flops_per_pair=4 * len(layers) * config.num_attention_heads * head_dim,
        )

    def decode_bytes(self, batch: int, context: int) -> int:
        return self.weight_bytes + batch * context * self.kv_bytes_per_token

    def prefill_flops(self, tokens: int) -> int:
        return tokens * self.flops_per_token + tokens * (tokens + 1) // 2 * self.attention_flops_per_pair


def build(name: str, device: torch.device, dtype: torch.dtype, longest: int) -> Any:
    """The model, its weights random and made on the device."""
    config = LlamaConfig(**SHAPES[name], max_position_embeddings=longest, bos_token_id=0, eos_token_id=1)
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = AutoModelForCausalLM.from_config(config)
    finally:
        torch.set_default_dtype(default)
    return model.to(dtype).eval().requires_grad_(False)


def save(model: Any, directory: Path) -> None:
    """A directory that `softbatch serve --model` takes."""
    model.save_pretrained(directory)
    words = {f"w{index}": index for index in range(model.config.vocab_size)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w2"))
    tokenizer.pre_tokenizer = Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="w0", eos_token="w1", unk_token="w2")
    fast.save_pretrained(directory)
