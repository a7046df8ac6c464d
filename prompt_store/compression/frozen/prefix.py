"""Attention with a prefix in front: what stands for a context or for σ, and what rows behind it make of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface

ATTENTION_NAME = "softbatch_prefix"
# Attention weights that are held at once where no gradient needs them.
MAX_WEIGHTS = 1 << 26


@dataclass(frozen=True)
class Prefix:
    """Keys and values [layers, n, kv_heads, head_dim] of tokens 0..n-1, keys already rotated."""

    keys: Tensor
    values: Tensor

    @property
    def length(self) -> int:
        return self.keys.shape[1]

    @property
    def num_bytes(self) -> int:
        return self.keys.numel() * self.keys.element_size() + self.values.numel() * self.values.element_size()

    def to(self, dtype: torch.dtype) -> Prefix:
        return Prefix(self.keys.to(dtype), self.values.to(dtype))

    def select(self, positions: Tensor) -> Prefix:
        return Prefix(self.keys[:, positions], self.values[:, positions])

    def detach(self) -> Prefix:
        return Prefix(self.keys.detach(), self.values.detach())


@dataclass
class LayerTrace:
    """What the attention of one layer saw and gave: queries and outputs [batch, heads, tokens, head_dim],
    keys and values [batch, kv_heads, tokens, head_dim], all rotated and without the prefix."""

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    scale: float


@dataclass(frozen=True)
class LayeredPrefix:
    """A prefix cut into its layers, [kv_heads, n, head_dim] each, once per forward (and once in its
    gradient)."""

    keys: Sequence[Tensor]
    values: Sequence[Tensor]
    length: int

    @classmethod
    def of(cls, prefix: Prefix, dtype: torch.dtype) -> LayeredPrefix:
        keys = prefix.keys.to(dtype).transpose(1, 2).unbind(0)
        values = prefix.values.to(dtype).transpose(1, 2).unbind(0)
        return cls(keys, values, prefix.length)


# (query, key, value, keys, values, scale) as `attend` takes them.
Attend = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, float], Tensor]
# (layer, query, key, value, scale): one layer's attention of [batch, heads, tokens, head_dim], to the same.
AttendInLayer = Callable[[int, Tensor, Tensor, Tensor, float], Tensor]


@dataclass
class AttentionCall:
    """One forward's view of what lies before its tokens; handed to every layer."""

    attend: Attend
    prefix: LayeredPrefix | None = None
    on_layer: Callable[[int, LayerTrace], None] | None = None
    cache: DecodeCache | None = None
    longest: int = 0  # of the cache's rows, with the tokens of this forward
    windows: Sequence[int | None] = ()  # of each layer: how many tokens each sees, itself among them; None: all


@dataclass
class DecodeCache:
    """Keys and values of the tokens after the prefix, [layers, batch, kv_heads, capacity, head_dim], ragged:
    row b holds `lengths[b]` tokens. The forward writes at `lengths` and the caller advances them."""

    keys: Tensor
    values: Tensor
    lengths: Tensor


def prefix_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    call: AttendInLayer | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention of [batch, heads, tokens, head_dim] queries over (prefix, own tokens).

    Rows are padded on the right, so that causality alone hides the padding. Query heads that share a kv head
    are folded into the token axis: nothing is repeated in memory.
    """
    if call is None:
        raise RuntimeError("the model runs with the compression attention: call it through Decoder")
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    return call(layer, query, key, value, scaling or query.shape[-1] ** -0.5).transpose(1, 2), None


def attend_in_layer(call: AttentionCall, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    window = call.windows[layer] if call.windows else None
    if call.cache is not None:
        inputs = (layer, query, key, value, scale, window)
        return _decode_attention(call.cache, call.longest, call.prefix, *inputs).transpose(1, 2)
    if call.prefix is None or call.prefix.length == 0:
        output = _attend_alone(query, key, value, scale, window)
    else:
        prefix = call.prefix.keys[layer], call.prefix.values[layer]
        output = attend_within(window, call.attend, query, key, value, *prefix, scale)
    if call.on_layer is not None:
        call.on_layer(layer, LayerTrace(query, key, value, output, scale))
    return output


def _attend_alone(query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
    tokens, grouped = query.shape[2], query.shape[1] > key.shape[1]
    if window is None or window >= tokens:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=grouped)
    mask = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device).tril().triu(1 - window)
    return F.scaled_dot_product_attention(query, key, value, mask, scale=scale, enable_gqa=grouped)


def _decode_attention(
    cache: DecodeCache,
    capacity: int,
    prefix: LayeredPrefix | None,
    layer: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    window: int | None,
) -> Tensor:
    """One new token per row over (shared prefix, the row's own cache); the prefix is read once for all
    rows."""
    batch, heads, _, dim = query.shape
    kv_heads = key.shape[1]
    rows = torch.arange(batch, device=key.device)
    cache.keys[layer][rows, :, cache.lengths] = key[:, :, 0]
    cache.values[layer][rows, :, cache.lengths] = value[:, :, 0]
    folded = query.reshape(batch, kv_heads, heads // kv_heads, dim) * scale
    scores = folded @ cache.keys[layer][:, :, :capacity].transpose(2, 3)
    places = torch.arange(capacity, device=key.device)[None]
    hidden = places > cache.lengths[:, None]
    if window is not None:
        hidden |= places <= cache.lengths[:, None] - window
    scores = scores.masked_fill(hidden[:, None, None], float("-inf"))
    if prefix is None:
        return (scores.softmax(-1) @ cache.values[layer][:, :, :capacity]).reshape(batch, 1, heads, dim)
    together = folded.transpose(0, 1).reshape(kv_heads, -1, dim)
    before = together @ prefix.keys[layer].transpose(1, 2)
    before = before.view(kv_heads, batch, -1, prefix.length).transpose(0, 1)
    if window is not None:
        places = torch.arange(prefix.length, device=key.device)[None]
        hidden = places <= prefix.length + cache.lengths[:, None] - window
        before = before.masked_fill(hidden[:, None, None], float("-inf"))
    weights = torch.cat((before, scores), dim=-1).float().softmax(-1).to(key.dtype)
    before, own = torch.split(weights, [prefix.length, capacity], dim=-1)
    output = own @ cache.values[layer][:, :, :capacity]
    before = before.transpose(0, 1).reshape(kv_heads, -1, prefix.length)
    shared = before @ prefix.values[layer]
    output = output + shared.view(kv_heads, batch, -1, dim).transpose(0, 1)
    return output.reshape(batch, 1, heads, dim)


def attention_weights(
    query: Tensor, key: Tensor, keys: Tensor, scale: float, window: int | None = None
) -> tuple[Tensor, Tensor]:
    """What causal attention gives to a prefix that all rows share, [kv_heads, batch * rows, n], and to the rows' own
    tokens, [kv_heads, batch * rows, tokens], where rows are (query head of the kv head, token).

    `query` [batch, heads, tokens, head_dim], `key` the rows' own [batch, kv_heads, tokens, head_dim], `keys` the
    prefix's [kv_heads, n, head_dim]. A token sees no more than `window` tokens, itself among them.
    """
    batch, heads, tokens, dim = query.shape
    kv_heads, length = keys.shape[0], keys.shape[1]
    hides = window is not None and window < length + tokens
    rows = heads // kv_heads * tokens
    query = (query * scale).reshape(batch, kv_heads, rows, dim)
    future = torch.full((tokens, tokens), float("-inf"), dtype=query.dtype, device=query.device).triu(1)
    if window is not None and hides:
        future += torch.full_like(future, float("-inf")).tril(-window)
    own = query @ key.transpose(-1, -2) + future.repeat(heads // kv_heads, 1)
    # The large one is never copied into another order: the small one is.
    shared = query.transpose(0, 1).reshape(kv_heads, batch * rows, dim) @ keys.transpose(-1, -2)
    if window is not None and hides:
        places = torch.arange(length, device=query.device)
        hidden = places <= length - window + torch.arange(tokens, device=query.device)[:, None]
        shared = shared.masked_fill(hidden.repeat(batch * heads // kv_heads, 1), float("-inf"))
    own = own.transpose(0, 1).reshape(kv_heads, batch * rows, tokens)
    before, after = torch.split(torch.cat((shared, own), dim=-1).softmax(-1), [length, tokens], dim=-1)
    return before, after


def attend_within(
    window: int | None,
    attention: Attend,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
) -> Tensor:
    """`attention` where no token sees further back than `window` tokens, itself among them. What none of them sees is
    left out; a mask is needed only where some see what others do not."""
    if window is None:
        return attention(query, key, value, keys, values, scale)
    seen = max(0, keys.shape[1] + 1 - window)
    keys, values = keys[:, seen:], values[:, seen:]
    if window >= keys.shape[1] + query.shape[2]:
        return attention(query, key, value, keys, values, scale)
    return attend(query, key, value, keys, values, scale, window)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """Causal attention [batch, heads, tokens, head_dim] of queries over a prefix that all rows share, then their own.

    Plain products, one over the prefix for all rows together: on CPUs several times as fast, forwards and backwards,
    as scaled_dot_product_attention with a mask over prefix and rows.
    """
    batch, heads, tokens, _ = query.shape
    length = keys.shape[1]
    step = max(1, MAX_WEIGHTS // (heads * tokens * (length + tokens)))
    if step < batch and not torch.is_grad_enabled():
        parts = [slice(first, first + step) for first in range(0, batch, step)]
        return torch.cat([attend(query[part], key[part], value[part], keys, values, scale, window) for part in parts])
    return weighted_values(*attention_weights(query, key, keys, scale, window), value, values)


def weighted_values(before: Tensor, after: Tensor, value: Tensor, values: Tensor) -> Tensor:
    """What attention gives with the weights of `attention_weights`, [batch, heads, tokens, head_dim]."""
    batch, kv_heads, tokens, dim = value.shape
    shared = (before @ values).view(kv_heads, batch, -1, dim).transpose(0, 1)
    own = after.reshape(kv_heads, batch, -1, tokens).transpose(0, 1) @ value
    return (shared + own).reshape(batch, -1, tokens, dim)


AttentionInterface.register(ATTENTION_NAME, prefix_attention)
