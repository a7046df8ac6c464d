"""The one signature of all attention backends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from softbatch.scheduler.model.attention.tiles import AttentionPlan


@dataclass(frozen=True)
class PagedBatch:
    """What attention needs to know of a step: S sequences, whose T new tokens are concatenated.

    Sequence s owns the query rows query_start[s] … query_start[s+1]−1. They are the last of its context_len[s]
    positions, so that row i of q rows sees keys 0 … context_len[s] − q + i.
    """

    query_start: torch.Tensor  # int32 [S + 1]
    context_len: torch.Tensor  # int32 [S], this step's tokens included
    block_table: torch.Tensor  # int32 [S, most blocks of any sequence], rows padded with 0
    slot_mapping: torch.Tensor  # int64 [T], block * block_size + offset where each new token's K and V go
    plan: AttentionPlan | None = None  # the work of the GPU's kernels, planned once for all layers
    # What CPUs must know so that a sequence's result is the same bit for bit, whatever else the step computes:
    decodes: torch.Tensor | None = None  # bool [S], whether a query of one row decodes; None: each such one does
    joins_ranges: bool = True  # keys that many sequences share may be computed for all of them at once


@dataclass(frozen=True, eq=False)
class AttentionKind:
    """How the attention of a layer differs from plain causal attention.

    A token sees itself and the `window` - 1 tokens before it. Scores x, once scaled, become
    softcap * tanh(x / softcap), and each head's sink is one more score, which takes its share of the weights and has no
    value.
    """

    window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None  # [heads]


CAUSAL = AttentionKind()


class AttentionBackend(Protocol):
    """Writes the new keys and values into the paged cache, then attends causally over it, as `kind` says.

    Shapes: query [T, heads, head_dim]; key and value [T, kv_heads, head_dim]; caches
    [num_blocks, kv_heads, block_size, head_dim]; returns [T, heads, head_dim]. heads is a multiple of
    kv_heads; query head h reads kv head h // (heads // kv_heads). Softmax runs in float32.
    """

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        batch: PagedBatch,
        scale: float,
        kind: AttentionKind = CAUSAL,
    ) -> torch.Tensor: ...
