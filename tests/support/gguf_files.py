"""Small GGUF files with the embedded model's tokenizer, and whatever metadata a test wants."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, GGUFValueType, GGUFWriter

from softbatch.scheduler.model.source import _embedded_gguf

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


def write_gguf(
    path: Path,
    fields: Mapping[str, Any] | None = None,
    weights: Mapping[str, np.ndarray[Any, Any]] | None = None,
) -> Path:
    """A Llama whose metadata is `NUMBERS` with `fields` over it."""
    writer = GGUFWriter(str(path), "llama")
    numbers = NUMBERS | dict(fields or {})
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
        writer.add_key_value(name, value, kinds[type(value)])
    for name, tensor in (weights or tensors()).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
