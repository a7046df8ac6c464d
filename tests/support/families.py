"""Tiny random models of many families, as directories that `--model` takes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from tests.support.models import FEW_TOKENS, keep_first_tokens

SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GEMMA = SIZES | {"head_dim": 8}
MIXED = ["sliding_attention", "full_attention"]
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": SIZES,
    "qwen2": SIZES,
    "qwen3": SIZES | {"head_dim": 16},
    "mistral": SIZES | {"sliding_window": None},
    "gemma": GEMMA,
    "gemma3_text": GEMMA | {"sliding_window": 256},
    "phi3": SIZES | {"sliding_window": None},
    "olmo2": SIZES,
    "granite": SIZES,
    "smollm3": SIZES,
    "gpt_neox": {name: value for name, value in SIZES.items() if name != "num_key_value_heads"},
    "gpt2": {"vocab_size": 512, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "eos_token_id": 2},
    "gemma2": GEMMA | {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0, "query_pre_attn_scalar": 8},
    "olmo3": SIZES,
    "ministral": SIZES | {"head_dim": 8},
    "ministral3": SIZES | {"head_dim": 8},
    "cohere2": SIZES,
    "starcoder2": SIZES,
    "mixtral": SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": SIZES | {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
}
WINDOW = 13
SCALED_BY_POSITION = {
    "rope_type": "yarn",
    "factor": 16.0,
    "original_max_position_embeddings": 16,
    "max_position_embeddings": 16,
    "rope_theta": 1e4,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}


def longrope(frequencies: int, original: int) -> dict[str, Any]:
    """Positions that turn far more slowly in sequences of more than `original` tokens."""
    return {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0 + 0.1 * i for i in range(frequencies)],
        "long_factor": [4.0 + 3.0 * i for i in range(frequencies)],
        "original_max_position_embeddings": original,
    }


# Windows shorter than a prompt, and what else a family does otherwise than Llama: each is served as transformers
# computes it (tests/scheduler/engine/test_families.py). The names are those that people know them by.
SERVED: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("llama", {}),
    "Mistral": ("mistral", {"sliding_window": WINDOW}),
    "Ministral": ("ministral", {"sliding_window": WINDOW, "layer_types": MIXED}),
    "Ministral 3": ("ministral3", {"rope_parameters": SCALED_BY_POSITION}),
    "Mixtral": ("mixtral", {"sliding_window": WINDOW}),
    "Qwen2, Qwen2.5": ("qwen2", {"sliding_window": WINDOW, "use_sliding_window": True, "max_window_layers": 1}),
    "Qwen3": ("qwen3", {"sliding_window": WINDOW, "use_sliding_window": True, "max_window_layers": 1}),
    "Gemma": ("gemma", {}),
    "Gemma 2": ("gemma2", {"sliding_window": WINDOW, "layer_types": MIXED}),
    "Gemma 3": ("gemma3_text", {"sliding_window": WINDOW, "layer_types": MIXED}),
    "Phi-3": ("phi3", {"sliding_window": WINDOW}),
    "Phi-4-mini": (
        "phi3",
        {
            "rope_parameters": longrope(2, 40) | {"partial_rotary_factor": 0.5},
            "original_max_position_embeddings": 40,
        },
    ),
    "SmolLM3": ("smollm3", {"no_rope_layers": [1, 0]}),
    "OLMo 2": ("olmo2", {}),
    "OLMo 3": ("olmo3", {"sliding_window": WINDOW, "layer_types": MIXED}),
    "Granite": (
        "granite",
        {"embedding_multiplier": 3.0, "residual_multiplier": 0.4, "attention_multiplier": 0.5, "logits_scaling": 2.0},
    ),
    "Command R7B": ("cohere2", {"sliding_window": WINDOW, "layer_types": MIXED}),
    "StarCoder2": ("starcoder2", {"sliding_window": WINDOW}),
    "gpt-oss": ("gpt_oss", {"sliding_window": WINDOW, "layer_types": MIXED}),
    "GPT-NeoX": ("gpt_neox", {}),
    "GPT-2": ("gpt2", {}),
}


def save_family(
    path: Path, tokenizer_of: str, kind: str = "llama", dtype: torch.dtype | None = None, **fields: Any
) -> Path:
    """A random model of `kind` with the first tokens of another directory's tokenizer, as reading them all takes longer
    than all else; its weights are spread wider than at first."""
    torch.manual_seed(11)
    config = AutoConfig.for_model(kind, **(FAMILIES[kind] | fields))
    model = AutoModelForCausalLM.from_config(config, dtype=dtype or torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
        for name, parameter in model.named_parameters():
            if name.endswith("sinks"):
                parameter.normal_(0, 2)
    model.save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(tokenizer_of) / name, path / name)
    keep_first_tokens(path, FEW_TOKENS)
    return path


def skeleton(kind: str, **fields: Any) -> Any:
    """A model of `kind` without weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(FAMILIES[kind] | fields)))


def edit_weights(path: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    """Write the directory's weights anew."""
    file = path / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
