"""Paged attention in plain torch, on any device: the reference for every kernel, and the fallback without one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import torch

from softbatch.scheduler.model.attention.backend import CAUSAL, AttentionKind, PagedBatch

_MAX_ROWS = 256  # query rows whose scores are held at once


def reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    batch: PagedBatch,
    scale: float,
    kind: AttentionKind = CAUSAL,
) -> torch.Tensor:
    """`AttentionBackend` by its definition: gather keys and values, mask scores, softmax, sum weighted values."""
    block_size = key_cache.shape[2]
    blocks, slots = batch.slot_mapping // block_size, batch.slot_mapping % block_size
    key_cache[blocks, :, slots] = key
    value_cache[blocks, :, slots] = value

    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    for sequences, rows in _alike(batch):
        context = batch.context_len[sequences].long()
        longest = int(context.max())
        table = batch.block_table[sequences, : -(-longest // block_size)].long()
        keys, values = (_gather(cache, table, longest) for cache in (key_cache, value_cache))
        key_position = torch.arange(longest, device=query.device)
        # Slots past a sequence's end may hold NaN, and 0 · NaN is NaN. So masking the scores is not enough.
        unused = (key_position >= context[:, None])[:, None, :, None]
        keys, values = keys.masked_fill(unused, 0), values.masked_fill(unused, 0)
        first = context - rows.shape[1]
        for start in range(0, rows.shape[1], _MAX_ROWS):
            part = rows[:, start : start + _MAX_ROWS]
            offset = torch.arange(start, start + part.shape[1], device=query.device)
            position = first[:, None, None] + offset[:, None]
            visible = key_position <= position
            if kind.window is not None:
                visible &= key_position > position - kind.window
            out[part] = _attend(query[part], keys, values, visible, scale, kind).to(out.dtype)
    return out


def _alike(batch: PagedBatch) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Groups of sequences that one padded product computes: (sequence indices [n], query rows [n, q]).

    Decoding sequences (q = 1) of similar length share a group. Every other sequence is a group of its own.
    """
    starts, contexts = batch.query_start.tolist(), batch.context_len.tolist()
    decoding: dict[int, list[int]] = defaultdict(list)
    device = batch.query_start.device
    for sequence, context in enumerate(contexts):
        start, end = starts[sequence], starts[sequence + 1]
        if end - start == 1:
            decoding[context.bit_length()].append(sequence)
        elif end > start:
            yield torch.tensor([sequence], device=device), torch.arange(start, end, device=device)[None]
    for alike in decoding.values():
        sequences = torch.tensor(alike, device=device)
        yield sequences, batch.query_start[sequences].long()[:, None]


def _gather(cache: torch.Tensor, table: torch.Tensor, length: int) -> torch.Tensor:
    """Returns the first `length` tokens of each row's blocks as float32 [n, kv_heads, length, head_dim]."""
    return cache[table].transpose(1, 2).flatten(2, 3)[:, :, :length].float()


def _attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    visible: torch.Tensor,
    scale: float,
    kind: AttentionKind,
) -> torch.Tensor:
    """Softmax attention in float32: query [n, q, heads, head_dim], visible [n, q, length]; returns query's shape."""
    n, q, heads, head_dim = query.shape
    grouped = query.float().transpose(1, 2).reshape(n, keys.shape[1], -1, head_dim)
    scores = (grouped @ keys.transpose(-1, -2)).mul_(scale).view(n, heads, q, -1)
    if kind.softcap is not None:
        scores.div_(kind.softcap).tanh_().mul_(kind.softcap)
    scores.masked_fill_(~visible[:, None], float("-inf"))
    if kind.sinks is not None:
        sinks = kind.sinks.float().view(1, heads, 1, 1).expand(n, heads, q, 1)
        scores = torch.cat((scores, sinks), dim=-1)
    weights = scores.softmax(-1)[..., : keys.shape[2]].reshape(n, keys.shape[1], -1, keys.shape[2])
    return (weights @ values).view(n, heads, q, head_dim).transpose(1, 2)
