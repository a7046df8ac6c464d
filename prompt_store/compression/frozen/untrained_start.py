"""The untrained start: the context's own tokens, chosen evenly and moved to positions 0..n-1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from softbatch.prompt_store.compression.frozen.frozen_model import Decoder
from softbatch.prompt_store.compression.frozen.prefix import Prefix


def chosen_positions(total: int, count: int, head: int, tail: int, chunks: int = 8) -> list[int]:
    """`count` of `total` positions: the first `head` and last `tail` (the turn's own marks) and, between
    them, equal chunks spread evenly. Raises ValueError when there are fewer than `count` tokens to choose
    from."""
    if not 1 <= count <= total:
        raise ValueError(f"virtual_tokens must lie between 1 and the context's {total} tokens, got {count}")
    head = min(head, count)
    tail = min(tail, count - head)
    inner = count - head - tail
    space = total - head - tail
    chunks = max(1, min(chunks, inner))
    chosen = list(range(head))
    for chunk in range(chunks):
        size = (chunk + 1) * inner // chunks - chunk * inner // chunks
        start = head + chunk * space // chunks
        room = head + (chunk + 1) * space // chunks - start
        chosen.extend(range(start + (room - size) // 2, start + (room - size) // 2 + size))
    chosen.extend(range(total - tail, total))
    return chosen


def truncated_ids(ids: Sequence[int], count: int, tail: int) -> list[int]:
    """The first tokens and the turn's last `tail` ones, `count` in all: the context cut to σ's length."""
    tail = min(tail, count)
    return [*ids[: count - tail], *ids[len(ids) - tail :]]


def moved_prefix(decoder: Decoder, prefixes: Sequence[Prefix], positions: Sequence[int]) -> Prefix:
    """The KV at `positions` of the prefixes laid end to end, keys rotated to 0..n-1; fp32 at least.

    A model without rotary positions keeps its keys as they are.
    """
    master = torch.promote_types(decoder.dtype, torch.float32)
    owners = [(part, at) for part, prefix in enumerate(prefixes) for at in range(prefix.length)]
    chosen = [owners[position] for position in positions]
    keys = torch.stack([prefixes[part].keys[:, at] for part, at in chosen], dim=1).to(master)
    values = torch.stack([prefixes[part].values[:, at] for part, at in chosen], dim=1).to(master)
    shift = torch.arange(len(chosen), device=keys.device) - torch.tensor([at for _, at in chosen], device=keys.device)
    if not has_rotary(decoder):
        return Prefix(keys, values)
    return Prefix(rotated(decoder, keys.transpose(1, 2), shift).transpose(1, 2), values)


def has_rotary(decoder: Decoder) -> bool:
    return any(kind is not None for kind in decoder.rotary_kinds)


def moved(decoder: Decoder, states: Tensor, shift: int) -> Tensor:
    """Queries or keys [layers, ..., tokens, head_dim] as they would be `shift` positions further on."""
    if not has_rotary(decoder) or shift == 0:
        return states
    return rotated(decoder, states, torch.full((states.shape[-2],), shift, device=states.device))


def rotated(decoder: Decoder, states: Tensor, shift: Tensor) -> Tensor:
    """Rotary queries or keys [layers, ..., tokens, head_dim] turned by `shift` [tokens] positions (rotate-half form),
    in each layer as it turns its own."""
    kinds = decoder.rotary_kinds
    if len(set(kinds)) == 1:
        return _turned(decoder, states, shift, kinds[0])
    return torch.stack([_turned(decoder, of_layer, shift, kind) for of_layer, kind in zip(states, kinds, strict=True)])


def _turned(decoder: Decoder, states: Tensor, shift: Tensor, kind: str | None) -> Tensor:
    if kind is None:
        return states
    rotary: Any = decoder.body.rotary_emb
    wide = states.to(torch.promote_types(states.dtype, torch.float32))
    cos, sin = rotary(wide, shift[None], kind) if kind else rotary(wide, shift[None])
    scale = float(getattr(rotary, f"{kind}_attention_scaling" if kind else "attention_scaling", 1.0))
    cos, sin = cos[0] / scale, sin[0] / scale
    size = cos.shape[-1]
    turned, rest = wide[..., :size], wide[..., size:]
    left, right = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat((-right, left), dim=-1) * sin
    return torch.cat((turned, rest), dim=-1).to(states.dtype)
