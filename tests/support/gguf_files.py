"""Small GGUF files with the embedded model's tokenizer, and whatever metadata a test wants."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from gguf.quants import quantize

from softbatch.scheduler.model.cpu.formats import BlockKind
from softbatch.scheduler.model.source import _embedded_gguf
from tests.support.gguf_blocks import random_blocks
from tests.support.tokenizers_of_bytes import byte_fallback

HIDDEN, FEED_FORWARD, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 32, 64, 2, 4, 2, 8
VOCAB = 512  # of the embedded model's, whose merges come in the order of the tokens they make
NUMBERS: dict[str, Any] = {
    "llama.context_length": 16384,
    "llama.embedding_length": HIDDEN,
    "llama.block_count": LAYERS,
    "llama.feed_forward_length": FEED_FORWARD,
    "llama.attention.head_count": HEADS,
    "llama.attention.head_count_kv": KV_HEADS,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.dimension_count": HEAD_DIM,
    "llama.rope.freq_base": 10000.0,
    "llama.vocab_size": VOCAB,
}


EXPERTS, EXPERT_FEED_FORWARD = 4, 16


def expert_numbers() -> dict[str, Any]:
    """Of a tiny Qwen3 with experts."""
    said = {name.replace("llama.", "qwen3moe."): value for name, value in NUMBERS.items()}
    return said | {
        "qwen3moe.attention.key_length": HEAD_DIM,
        "qwen3moe.attention.value_length": HEAD_DIM,
        "qwen3moe.expert_count": EXPERTS,
        "qwen3moe.expert_used_count": 2,
        "qwen3moe.expert_feed_forward_length": EXPERT_FEED_FORWARD,
    }


def expert_tensors() -> dict[str, np.ndarray[Any, Any]]:
    """The same of it: each layer's experts are stacked in one tensor."""
    rng = np.random.default_rng(6)
    found = {name: tensor for name, tensor in tensors().items() if not name.endswith(("gate.weight", "up.weight"))}
    for layer in range(LAYERS):
        del found[f"blk.{layer}.ffn_down.weight"]
        shapes = {
            "attn_q_norm": (HEAD_DIM,),
            "attn_k_norm": (HEAD_DIM,),
            "ffn_gate_inp": (EXPERTS, HIDDEN),
            "ffn_gate_exps": (EXPERTS, EXPERT_FEED_FORWARD, HIDDEN),
            "ffn_up_exps": (EXPERTS, EXPERT_FEED_FORWARD, HIDDEN),
            "ffn_down_exps": (EXPERTS, HIDDEN, EXPERT_FEED_FORWARD),
        }
        for name, shape in shapes.items():
            found[f"blk.{layer}.{name}.weight"] = rng.normal(0, 0.15, shape).astype(np.float32)
    return found


def phi3_numbers() -> dict[str, Any]:
    return {name.replace("llama.", "phi3."): value for name, value in NUMBERS.items()}


LONGROPE: dict[str, Any] = {  # what converters write of a Phi-3 whose positions turn by the length of a sequence
    "phi3.context_length": 256,
    "phi3.rope.dimension_count": HEAD_DIM // 2,
    "phi3.rope.scaling.original_context_length": 40,
    "phi3.rope.scaling.attn_factor": 1.19,
}


def phi3_tensors() -> dict[str, np.ndarray[Any, Any]]:
    """A tied Phi-3 with factors for both lengths of sequences."""
    rng = np.random.default_rng(8)
    shapes = {"token_embd.weight": (VOCAB, HIDDEN)}
    found = {"output_norm.weight": np.ones(HIDDEN, np.float32)}
    for layer in range(LAYERS):
        shapes |= {
            f"blk.{layer}.attn_qkv.weight": ((HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN),
            f"blk.{layer}.attn_output.weight": (HIDDEN, HEADS * HEAD_DIM),
            f"blk.{layer}.ffn_up.weight": (2 * FEED_FORWARD, HIDDEN),
            f"blk.{layer}.ffn_down.weight": (HIDDEN, FEED_FORWARD),
        }
        for norm in ("attn_norm", "ffn_norm"):
            found[f"blk.{layer}.{norm}.weight"] = np.ones(HIDDEN, np.float32)
    found |= {name: rng.normal(0, 0.15, shape).astype(np.float32) for name, shape in shapes.items()}
    return found | {
        "rope_factors_short.weight": np.array([1.0, 1.25], np.float32),
        "rope_factors_long.weight": np.array([3.0, 9.5], np.float32),
    }


def gpt2_numbers() -> dict[str, Any]:
    return {
        "gpt2.context_length": 64,
        "gpt2.embedding_length": HIDDEN,
        "gpt2.block_count": 1,
        "gpt2.feed_forward_length": 4 * HIDDEN,
        "gpt2.attention.head_count": HEADS,
        "gpt2.attention.layer_norm_epsilon": 1e-5,
        "gpt2.vocab_size": VOCAB,
    }


def gpt2_tensors(feed_forward: int = 4 * HIDDEN) -> dict[str, np.ndarray[Any, Any]]:
    """A tied GPT-2 of one layer."""
    rng = np.random.default_rng(7)
    found: dict[str, np.ndarray[Any, Any]] = {}
    for name, (rows, columns) in {
        "attn_qkv": (3 * HIDDEN, HIDDEN),
        "attn_output": (HIDDEN, HIDDEN),
        "ffn_up": (feed_forward, HIDDEN),
        "ffn_down": (HIDDEN, feed_forward),
    }.items():
        found[f"blk.0.{name}.weight"] = rng.normal(0, 0.15, (rows, columns)).astype(np.float32)
        found[f"blk.0.{name}.bias"] = np.zeros(rows, dtype=np.float32)
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        found |= {f"{name}.weight": np.ones(HIDDEN, np.float32), f"{name}.bias": np.zeros(HIDDEN, np.float32)}
    for name, rows in (("token_embd", VOCAB), ("position_embd", 64)):
        found[f"{name}.weight"] = rng.normal(0, 0.15, (rows, HIDDEN)).astype(np.float32)
    return found


def tensors() -> dict[str, np.ndarray[Any, Any]]:
    """Random weights of a tied Llama, by the names that GGUF gives them."""
    rng = np.random.default_rng(5)
    shapes = {"token_embd.weight": (VOCAB, HIDDEN), "output_norm.weight": (HIDDEN,)}
    for layer in range(LAYERS):
        shapes |= {
            f"blk.{layer}.attn_norm.weight": (HIDDEN,),
            f"blk.{layer}.attn_q.weight": (HEADS * HEAD_DIM, HIDDEN),
            f"blk.{layer}.attn_k.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
            f"blk.{layer}.attn_v.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
            f"blk.{layer}.attn_output.weight": (HIDDEN, HEADS * HEAD_DIM),
            f"blk.{layer}.ffn_norm.weight": (HIDDEN,),
            f"blk.{layer}.ffn_gate.weight": (FEED_FORWARD, HIDDEN),
            f"blk.{layer}.ffn_up.weight": (FEED_FORWARD, HIDDEN),
            f"blk.{layer}.ffn_down.weight": (HIDDEN, FEED_FORWARD),
        }
    return {name: rng.normal(0, 0.15, shape).astype(np.float32) for name, shape in shapes.items()}


BLOCK_SIZES = (256, 512)  # of a Llama whose rows hold whole blocks of every kind: hidden, and of the MLP


def block_numbers() -> dict[str, Any]:
    hidden, feed_forward = BLOCK_SIZES
    return {
        "llama.embedding_length": hidden,
        "llama.feed_forward_length": feed_forward,
        "llama.rope.dimension_count": hidden // HEADS,
    }


def block_tensors(kinds: Sequence[BlockKind]) -> tuple[dict[str, np.ndarray[Any, Any]], dict[str, BlockKind]]:
    """Its weights with a head of its own, in blocks of these kinds in turn, and which each is of."""
    hidden, feed_forward = BLOCK_SIZES
    shapes = dict.fromkeys(("token_embd.weight", "output.weight"), (VOCAB, hidden))
    found: dict[str, np.ndarray[Any, Any]] = {"output_norm.weight": np.ones(hidden, np.float32)}
    for layer in range(LAYERS):
        shapes |= {
            f"blk.{layer}.attn_q.weight": (hidden, hidden),
            f"blk.{layer}.attn_k.weight": (hidden * KV_HEADS // HEADS, hidden),
            f"blk.{layer}.attn_v.weight": (hidden * KV_HEADS // HEADS, hidden),
            f"blk.{layer}.attn_output.weight": (hidden, hidden),
            f"blk.{layer}.ffn_gate.weight": (feed_forward, hidden),
            f"blk.{layer}.ffn_up.weight": (feed_forward, hidden),
            f"blk.{layer}.ffn_down.weight": (hidden, feed_forward),
        }
        for norm in ("attn_norm", "ffn_norm"):
            found[f"blk.{layer}.{norm}.weight"] = np.ones(hidden, np.float32)
    of_each = {name: kinds[i % len(kinds)] for i, name in enumerate(shapes)}
    for i, (name, (rows, inputs)) in enumerate(shapes.items()):
        found[name] = random_blocks(of_each[name], rows, inputs, seed=i, largest=0.2)
    return found, of_each


@cache
def _tokenizer() -> dict[str, tuple[Any, list[GGUFValueType]]]:
    """The embedded model's, cut off behind VOCAB tokens."""
    fields = GGUFReader(str(_embedded_gguf())).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()[:VOCAB]
    found = {}
    for name, field in fields.items():
        if name.startswith("tokenizer."):
            value = field.contents()
            if name == "tokenizer.ggml.merges":
                value = [merge for merge in value[:VOCAB] if merge.replace(" ", "") in tokens]
            found[name] = (value[:VOCAB] if len(field.types) > 1 else value, field.types)
    return found


def sentencepiece_fields() -> dict[str, Any]:
    """A small vocabulary of SentencePiece with bytes, in place of the embedded model's."""
    model = json.loads(byte_fallback().to_str())["model"]
    tokens = [*model["vocab"], "<s>", "</s>"]
    tokens += [f"<pad{i}>" for i in range(VOCAB - len(tokens))]
    control, byte, normal = 3, 6, 1
    kinds = [control if t[1:-1] in ("unk", "s", "/s") else byte if t.startswith("<0x") else normal for t in tokens]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [-float(i) for i in range(VOCAB)],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
        "tokenizer.ggml.bos_token_id": tokens.index("<s>"),
        "tokenizer.ggml.eos_token_id": tokens.index("</s>"),
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
    }


def write_gguf(
    path: Path,
    fields: Mapping[str, Any] | None = None,
    weights: Mapping[str, np.ndarray[Any, Any]] | None = None,
    architecture: str = "llama",
    quantized: GGMLQuantizationType | None = None,
    block_kinds: Mapping[str, BlockKind] | None = None,
) -> Path:
    """A Llama whose metadata is `NUMBERS` with `fields` over it; for another architecture, `fields` are all. What
    `block_kinds` names is bytes of blocks."""
    writer = GGUFWriter(str(path), architecture)
    numbers = (NUMBERS if architecture == "llama" else {}) | dict(fields or {})
    for name, (value, types) in _tokenizer().items():
        if name not in numbers:
            writer.add_key_value(name, value, types[0], sub_type=types[1] if len(types) > 1 else None)
    kinds = {
        bool: GGUFValueType.BOOL,
        int: GGUFValueType.UINT32,
        float: GGUFValueType.FLOAT32,
        str: GGUFValueType.STRING,
    }
    for name, value in numbers.items():
        if isinstance(value, list):
            writer.add_array(name, value)
        else:
            writer.add_key_value(name, value, kinds[type(value)])
    for name, tensor in (weights or tensors()).items():
        kind = (block_kinds or {}).get(name)
        if quantized is not None and tensor.ndim > 1:
            writer.add_tensor(name, quantize(tensor, quantized), raw_dtype=quantized)
        else:
            writer.add_tensor(name, tensor, raw_dtype=None if kind is None else GGMLQuantizationType(kind.value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
