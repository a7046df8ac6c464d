"""Tiny gpt-oss models whose experts are in MXFP4, as a checkpoint and as a GGUF file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import load_file

from softbatch.scheduler.model.cpu.formats import BlockKind
from tests.support.families import edit_weights, save_family
from tests.support.gguf_files import write_gguf

WINDOW = 13
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "head_dim": 16,
    "num_local_experts": 8,
    "num_experts_per_tok": 3,
    "sliding_window": WINDOW,
}
MATRICES = ("gate_up_proj", "down_proj")


def quantized(weights: torch.Tensor) -> np.ndarray[Any, Any]:
    """GGUF's blocks [..., bytes] nearest to float32 [..., inputs]."""
    return np.asarray(gguf.quantize(weights.numpy(), gguf.GGMLQuantizationType.MXFP4))


def as_checkpoint(blocks: np.ndarray[Any, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """GGUF's blocks as those of a checkpoint, one number after the other, and their scales."""
    each = blocks.reshape(*blocks.shape[:-1], -1, 17)
    numbers = np.concatenate((each[..., 1:] & 15, each[..., 1:] >> 4), -1)
    pairs = numbers[..., 0::2] + 16 * numbers[..., 1::2]
    return torch.from_numpy(pairs.astype(np.uint8)), torch.from_numpy(each[..., 0].copy())


def save_in_mxfp4(path: Path, tokenizer_of: str, **fields: Any) -> Path:
    """Experts' matrices as gpt-oss's checkpoints have them; large enough that their gates are cut off."""
    save_family(path, tokenizer_of, "gpt_oss", **(SIZES | fields))

    def change(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        found = dict(weights)
        for name in weights:
            if name.endswith(MATRICES):
                factor = 20.0 if name.endswith("gate_up_proj") else 1.0
                blocks, scales = as_checkpoint(quantized(factor * found.pop(name).float().mT.contiguous()))
                found |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        return found

    edit_weights(path, change)
    change_config(path, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    return path


def change_config(path: Path, **fields: Any) -> None:
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def gpt_oss_numbers(**said: Any) -> dict[str, Any]:
    numbers = {
        "context_length": 256,
        "embedding_length": SIZES["hidden_size"],
        "block_count": 2,
        "feed_forward_length": SIZES["intermediate_size"],
        "expert_feed_forward_length": SIZES["intermediate_size"],
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.key_length": SIZES["head_dim"],
        "attention.value_length": SIZES["head_dim"],
        "attention.layer_norm_rms_epsilon": 1e-5,
        "attention.sliding_window": WINDOW,
        "expert_count": SIZES["num_local_experts"],
        "expert_used_count": SIZES["num_experts_per_tok"],
        "rope.freq_base": 150000.0,
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 32.0,
        "rope.scaling.original_context_length": 4096,
    }
    return {f"gpt-oss.{name}": value for name, value in (numbers | said).items()}


_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.router": "ffn_gate_inp",
}


def save_as_gguf(path: Path, directory: Path, kind: BlockKind = BlockKind.MXFP4, **said: Any) -> Path:
    """The model of a directory that `save_in_mxfp4` made, as llama.cpp's converter names and orders its tensors; with
    another kind than MXFP4, experts are that kind's nearest."""
    weights = load_file(directory / "model.safetensors")
    tensors: dict[str, np.ndarray[Any, Any]] = {
        "token_embd.weight": weights["model.embed_tokens.weight"].numpy(),
        "output_norm.weight": weights["model.norm.weight"].numpy(),
        "output.weight": weights["lm_head.weight"].numpy(),
    }
    kinds: dict[str, BlockKind] = {}
    for layer in range(2):
        prefix, own = f"model.layers.{layer}.", f"blk.{layer}."
        for name, weight in weights.items():
            module, _, part = name.removeprefix(prefix).rpartition(".")
            if name.startswith(prefix) and module in _NAMES:
                tensors[f"{own}{_NAMES[module]}.{part}"] = weight.numpy()
        tensors[f"{own}attn_sinks.weight"] = weights[f"{prefix}self_attn.sinks"].numpy()
        experts = f"{prefix}mlp.experts."
        gate_up_bias = weights[f"{experts}gate_up_proj_bias"]
        found = {
            "gate": (_matrix(weights, f"{experts}gate_up_proj", kind)[:, 0::2], gate_up_bias[:, 0::2]),
            "up": (_matrix(weights, f"{experts}gate_up_proj", kind)[:, 1::2], gate_up_bias[:, 1::2]),
            "down": (_matrix(weights, f"{experts}down_proj", kind), weights[f"{experts}down_proj_bias"]),
        }
        for name, (matrix, bias) in found.items():
            tensors[f"{own}ffn_{name}_exps.weight"] = np.ascontiguousarray(matrix)
            tensors[f"{own}ffn_{name}_exps.bias"] = bias.contiguous().numpy()
            kinds[f"{own}ffn_{name}_exps.weight"] = kind
    return write_gguf(path, gpt_oss_numbers(**said), tensors, "gpt-oss", block_kinds=kinds)


def _matrix(weights: dict[str, torch.Tensor], name: str, kind: BlockKind) -> np.ndarray[Any, Any]:
    """[experts, outputs, bytes]."""
    blocks, scales = weights[f"{name}_blocks"].numpy(), weights[f"{name}_scales"].numpy()
    numbers = np.stack((blocks & 15, blocks >> 4), -1).reshape(*scales.shape, 32)
    halves = numbers[..., :16] + 16 * numbers[..., 16:]
    found = np.concatenate((scales[..., None], halves.astype(np.uint8)), -1).reshape(*scales.shape[:-1], -1)
    if kind is BlockKind.MXFP4:
        return found
    values = gguf.dequantize(found, gguf.GGMLQuantizationType.MXFP4)
    return np.asarray(gguf.quantize(values, gguf.GGMLQuantizationType(kind.value)))
