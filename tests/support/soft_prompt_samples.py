"""Small, valid soft prompts, models and tokenizers that the tests of prompt_store share."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from softbatch.prompt_store.soft_prompt_file import Manifest, ModelRef, ModelSpec, SoftPrompt, save
from softbatch.prompt_store.stores.directory import PromptStore

FINGERPRINT = "ab" * 32
SPEC = ModelSpec("tiny", FINGERPRINT, hidden_size=32, num_layers=3, num_kv_heads=2, head_dim=8)
MAX_BYTES = 1 << 24


def manifest(kind: str = "embeddings", n: int = 5, **changes: Any) -> Manifest:
    fields: dict[str, Any] = {
        "kind": kind,
        "num_virtual_tokens": n,
        "model": ModelRef(name=SPEC.name, fingerprint=SPEC.fingerprint),
        "replaces": "system",
        "source": "softbatch compress",
        "created_at": 1_700_000_000,
    }
    return Manifest(**{**fields, **changes})


def soft_prompt(
    kind: str = "embeddings",
    n: int = 5,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    spec: ModelSpec = SPEC,
) -> SoftPrompt:
    draw = torch.Generator().manual_seed(seed)
    if kind == "embeddings":
        return SoftPrompt(manifest(kind, n), embeddings=torch.randn(n, spec.hidden_size, generator=draw).to(dtype))
    shape = (spec.num_layers, n, spec.num_kv_heads, spec.head_dim)
    keys, values = torch.randn(2, *shape, generator=draw).to(dtype)
    return SoftPrompt(manifest(kind, n), keys=keys, values=values)


def split_file(data: bytes) -> tuple[dict[str, Any], bytes]:
    """The header and the tensor bytes of a safetensors file."""
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join_file(header: dict[str, Any], body: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def edit_manifest(path: Path, **changes: Any) -> None:
    """Rewrite fields of the manifest in place, as no public function would."""
    header, body = split_file(path.read_bytes())
    fields = json.loads(header["__metadata__"]["softbatch"])
    header["__metadata__"]["softbatch"] = json.dumps({**fields, **changes})
    path.write_bytes(join_file(header, body))


def tiny_llama(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """Grouped-query attention, so that confusing heads with kv heads shows."""
    fields: dict[str, Any] = {
        "vocab_size": 256,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
    }
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**fields, **changes})).eval()


def byte_tokenizer(chat_template: str | None = None, **tokens: str) -> PreTrainedTokenizerFast:
    """One token per byte: lossless, and small enough to make afresh in every test."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    named = {"bos_token": "<s>", "eos_token": "</s>", **tokens}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **named)
    tokenizer.chat_template = chat_template
    return tokenizer


def write(path: Path, seed: int, kind: str = "embeddings", n: int = 5) -> Path:
    save(soft_prompt(kind, n, seed), path)
    return path


def names(store: PromptStore) -> list[str]:
    return [stored.name for stored in store.list()]
