"""Another document's soft prompt, for the wrong-prompt baseline."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch

from softbatch.prompt_store.compression.frozen.frozen_model import Decoder
from softbatch.prompt_store.compression.frozen.prefix import Prefix
from softbatch.prompt_store.manifest import ModelSpec, SoftPromptError
from softbatch.prompt_store.soft_prompt_file import SoftPrompt, load
from softbatch.prompt_store.stores.open_store import open_store
from softbatch.prompt_store.stores.store import SoftPromptStore
from softbatch.server.compressions.prepare import PreparedRun


def another_prefix(prepared: PreparedRun, decoder: Decoder, spec: ModelSpec, root: Path) -> Prefix | None:
    """That of the run's own store, model and length. `root` is where the store's copies are, if it is a bucket."""
    request = prepared.request
    store = open_store(request.store, request.max_prompt_bytes, root)
    return other_prefix(store, decoder, spec, prepared.context.sha256, request.settings.virtual_tokens)


def other_prefix(
    store: SoftPromptStore, decoder: Decoder, spec: ModelSpec, sha256: str, length: int, besides: str = ""
) -> Prefix | None:
    """A soft prompt of this model and `length`, made of another context than `sha256` names; not the one named
    `besides`."""
    for stored in store.list():
        manifest = stored.manifest
        if (
            stored.name != besides
            and (manifest.context is None or manifest.context.sha256 != sha256)
            and manifest.model.fingerprint == spec.fingerprint
            and manifest.num_virtual_tokens == length
            and manifest.replaces == "system"
        ):
            with contextlib.suppress(SoftPromptError, OSError):  # damaged or gone: another will do
                return prefix_of(decoder, load(store.local_file(stored), store.max_bytes))
    return None


def prefix_of(decoder: Decoder, prompt: SoftPrompt) -> Prefix:
    """The KV that a soft prompt puts in front of the model."""
    tensors = {name: tensor.to(decoder.device) for name, tensor in prompt.tensors.items()}
    if prompt.manifest.kind == "embeddings":
        with torch.no_grad():
            return decoder.prefill(tensors["embeddings"])
    return Prefix(tensors["keys"], tensors["values"])
