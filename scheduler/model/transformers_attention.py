"""How `transformers` models reach our attention: one custom name in its attention interface."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from softbatch.scheduler.lasting_imports import importing_for_good
from softbatch.scheduler.model.attention.backend import AttentionBackend, AttentionKind, PagedBatch
from softbatch.scheduler.model.kv_cache import KVCache

ATTENTION_NAME = "softbatch"


@dataclass(frozen=True)
class PagedForward:
    """What the runner passes through the model to every attention layer of one forward pass."""

    kv_cache: KVCache
    batch: PagedBatch
    backend: AttentionBackend
    longest: int | None = None  # no sequence has more tokens, so that a window of as many hides nothing


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    paged: PagedForward,
    scaling: float | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention signature ([1, heads, T, head_dim] in, [1, T, heads, head_dim] out).

    No mask function is registered under our name, so that transformers makes no mask. Raises NotImplementedError for
    variants of attention whose result would be wrong.
    """
    window = options.pop("sliding_window", None)
    if window is not None and paged.longest is not None and window >= paged.longest:
        window = None
    kind = AttentionKind(window, options.pop("softcap", None), options.pop("s_aux", None))
    for name in ("position_bias", "head_mask"):
        if options.get(name) is not None:
            raise NotImplementedError(f"attention with {name} is not supported")
    layer: int = module.layer_idx  # type: ignore[assignment]
    output = paged.backend(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        paged.kv_cache.keys[layer],
        paged.kv_cache.values[layer],
        paged.batch,
        query.shape[-1] ** -0.5 if scaling is None else scaling,
        kind,
    )
    return output[None], None


def register() -> None:
    """Register the name with transformers. Idempotent."""
    with importing_for_good("transformers.modeling_utils"):
        from transformers import AttentionInterface  # which brings all that its models import

    AttentionInterface.register(ATTENTION_NAME, paged_attention)
