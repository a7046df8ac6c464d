"""Soft prompts for the benchmark's contexts: right in kind, shape and size, untrained.

The keys and values are those of each context's first tokens. How well a trained soft prompt answers is what the
fidelity report says; what serving one costs does not depend on its numbers.
"""

from __future__ import annotations

import hashlib
import sys
import tempfile
import time
from pathlib import Path

VIRTUAL_TOKENS = 64
BATCH = 16


def register(root: Path, count: int, context_tokens: int, vocab_size: int) -> None:
    """Put `context-0` to `context-{count-1}` into the prompt store at `root`, as far as they are not there."""
    from softbatch.prompt_store.stores.directory import PromptStore

    store = PromptStore(root, 256 << 20)
    present = {stored.name for stored in store.list()}
    missing = [index for index in range(count) if f"context-{index}" not in present]
    if missing:
        print(f"making {len(missing)} soft prompts in {root} …", file=sys.stderr, flush=True)
        _make(store, missing, context_tokens, vocab_size)


def _make(store: object, indices: list[int], num_tokens: int, vocab_size: int) -> None:
    import torch

    from softbatch.prompt_store.manifest import ContextRef, Manifest, ModelRef
    from softbatch.prompt_store.soft_prompt_file import SoftPrompt, save
    from softbatch.prompt_store.stores.directory import PromptStore
    from softbatch.scheduler.model.loader import load_transformers, spec_of
    from softbatch.scheduler.model.source import EMBEDDED_ALIAS, resolve
    from softbatch.server.bench.workload import context_tokens

    assert isinstance(store, PromptStore)
    source = resolve(EMBEDDED_ALIAS)
    model, tokenizer = load_transformers(source, torch.bfloat16, torch.device("cpu"))
    spec = spec_of(source.name, model, tokenizer)
    model.set_attn_implementation("sdpa")  # the server's own works on its paged cache alone
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory, "prompt.safetensors")
        for first in range(0, len(indices), BATCH):
            batch = indices[first : first + BATCH]
            contexts = [context_tokens(index, num_tokens, vocab_size) for index in batch]
            ids = torch.tensor([context[:VIRTUAL_TOKENS] for context in contexts])
            with torch.inference_mode():
                layers = model(ids, use_cache=True).past_key_values.layers
            # [layers, batch, tokens, kv_heads, head_dim], in float32 as `softbatch compress` writes them
            keys = torch.stack([layer.keys for layer in layers]).transpose(2, 3).float()
            values = torch.stack([layer.values for layer in layers]).transpose(2, 3).float()
            for row, (index, context) in enumerate(zip(batch, contexts, strict=True)):
                sha256 = hashlib.sha256(" ".join(map(str, context)).encode()).hexdigest()
                manifest = Manifest(
                    kind="kv",
                    num_virtual_tokens=VIRTUAL_TOKENS,
                    model=ModelRef(name=spec.name, fingerprint=spec.fingerprint),
                    replaces="nothing",
                    context=ContextRef(sha256=sha256, num_tokens=num_tokens),
                    source="benchmark, untrained",
                    created_at=int(time.time()),
                )
                save(SoftPrompt(manifest, keys=keys[:, row], values=values[:, row]), file)
                store.add(f"context-{index}", file)
                file.unlink()
