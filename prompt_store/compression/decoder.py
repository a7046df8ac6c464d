"""The frozen model as compression sees it: one attention function with a prefix in front, one forward.

Teacher (full context), student (σ) and every baseline are the same forward over a different `Prefix`, so that, but for
rounding, a difference in logits can only come from the prefix itself. Where no gradients are needed attention may be
another implementation, which rounds less.
"""

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


@dataclass
class AttentionCall:
    """One forward's view of what lies before its tokens; handed through the model to every layer."""

    attend: Attend
    prefix: LayeredPrefix | None = None
    on_layer: Callable[[int, LayerTrace], None] | None = None
    cache: DecodeCache | None = None


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
    call: AttentionCall | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention of [batch, heads, tokens, head_dim] queries over (prefix, own tokens).

    Rows are padded on the right, so that causality alone hides the padding. Query heads that share a kv head
    are folded into the token axis: nothing is repeated in memory.
    """
    if call is None:
        raise RuntimeError("the model runs with the compression attention: call it through Decoder")
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    dim = query.shape[-1]
    group = query.shape[1] // key.shape[1]
    if call.cache is not None:
        return _decode_attention(call.cache, call.prefix, layer, query, key, value, scaling), None
    if call.prefix is None or call.prefix.length == 0:
        output = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=group > 1)
    else:
        output = call.attend(
            query, key, value, call.prefix.keys[layer], call.prefix.values[layer], scaling or dim**-0.5
        )
    if call.on_layer is not None:
        call.on_layer(layer, LayerTrace(query, key, value, output, scaling or dim**-0.5))
    return output.transpose(1, 2), None


def _decode_attention(
    cache: DecodeCache,
    prefix: LayeredPrefix | None,
    layer: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
) -> Tensor:
    """One new token per row over (shared prefix, the row's own cache); the prefix is read once for all
    rows."""
    batch, heads, _, dim = query.shape
    kv_heads = key.shape[1]
    rows = torch.arange(batch, device=key.device)
    cache.keys[layer][rows, :, cache.lengths] = key[:, :, 0]
    cache.values[layer][rows, :, cache.lengths] = value[:, :, 0]
    folded = query.reshape(batch, kv_heads, heads // kv_heads, dim) * (scaling or dim**-0.5)
    capacity = int(cache.lengths.max()) + 1
    scores = folded @ cache.keys[layer][:, :, :capacity].transpose(2, 3)
    hidden = torch.arange(capacity, device=key.device)[None] > cache.lengths[:, None]
    scores = scores.masked_fill(hidden[:, None, None], float("-inf"))
    if prefix is None:
        return (scores.softmax(-1) @ cache.values[layer][:, :, :capacity]).reshape(batch, 1, heads, dim)
    together = folded.transpose(0, 1).reshape(kv_heads, -1, dim)
    before = together @ prefix.keys[layer].transpose(1, 2)
    before = before.view(kv_heads, batch, -1, prefix.length).transpose(0, 1)
    weights = torch.cat((before, scores), dim=-1).float().softmax(-1).to(key.dtype)
    before, own = torch.split(weights, [prefix.length, capacity], dim=-1)
    output = own @ cache.values[layer][:, :, :capacity]
    before = before.transpose(0, 1).reshape(kv_heads, -1, prefix.length)
    shared = before @ prefix.values[layer]
    output = output + shared.view(kv_heads, batch, -1, dim).transpose(0, 1)
    return output.reshape(batch, 1, heads, dim)


def attention_weights(query: Tensor, key: Tensor, keys: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """What causal attention gives to a prefix that all rows share, [kv_heads, batch * rows, n], and to the rows' own
    tokens, [kv_heads, batch * rows, tokens], where rows are (query head of the kv head, token).

    `query` [batch, heads, tokens, head_dim], `key` the rows' own [batch, kv_heads, tokens, head_dim], `keys` the
    prefix's [kv_heads, n, head_dim].
    """
    batch, heads, tokens, dim = query.shape
    kv_heads, length = keys.shape[0], keys.shape[1]
    rows = heads // kv_heads * tokens
    query = (query * scale).reshape(batch, kv_heads, rows, dim)
    future = torch.full((tokens, tokens), float("-inf"), dtype=query.dtype, device=query.device).triu(1)
    own = query @ key.transpose(-1, -2) + future.repeat(heads // kv_heads, 1)
    # The large one is never copied into another order: the small one is.
    shared = query.transpose(0, 1).reshape(kv_heads, batch * rows, dim) @ keys.transpose(-1, -2)
    own = own.transpose(0, 1).reshape(kv_heads, batch * rows, tokens)
    before, after = torch.split(torch.cat((shared, own), dim=-1).softmax(-1), [length, tokens], dim=-1)
    return before, after


def attend(query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """Causal attention [batch, heads, tokens, head_dim] of queries over a prefix that all rows share, then their own.

    Plain products, one over the prefix for all rows together: on CPUs several times as fast, forwards and backwards,
    as scaled_dot_product_attention with a mask over prefix and rows.
    """
    batch, heads, tokens, _ = query.shape
    length = keys.shape[1]
    step = max(1, MAX_WEIGHTS // (heads * tokens * (length + tokens)))
    if step < batch and not torch.is_grad_enabled():
        parts = [slice(first, first + step) for first in range(0, batch, step)]
        return torch.cat([attend(query[part], key[part], value[part], keys, values, scale) for part in parts])
    return weighted_values(*attention_weights(query, key, keys, scale), value, values)


def weighted_values(before: Tensor, after: Tensor, value: Tensor, values: Tensor) -> Tensor:
    """What attention gives with the weights of `attention_weights`, [batch, heads, tokens, head_dim]."""
    batch, kv_heads, tokens, dim = value.shape
    shared = (before @ values).view(kv_heads, batch, -1, dim).transpose(0, 1)
    own = after.reshape(kv_heads, batch, -1, tokens).transpose(0, 1) @ value
    return (shared + own).reshape(batch, -1, tokens, dim)


AttentionInterface.register(ATTENTION_NAME, prefix_attention)


@dataclass(frozen=True)
class Geometry:
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    vocab: int


def _refuse_unsupported(config: Any) -> None:
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if layers != {"full_attention"} or window is not None:
        raise ValueError("the model's attention is not full in every layer: compression does not support it")
    if getattr(config, "attn_logit_softcapping", None):
        raise ValueError("the model caps its attention scores: compression does not support it")


class Decoder:
    """A transformers causal LM with frozen weights; owns the model (its attention function is replaced).

    Raises ValueError for a model whose logits are not `lm_head(last hidden state)`, which does not pass its
    attention through the attention interface, or whose attention is not full. `attend_without_gradients` is a quicker
    `attend` for where none are needed.
    """

    def __init__(
        self,
        model: Any,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        attend_without_gradients: Attend | None = None,
    ) -> None:
        self.device = torch.device(device)
        self.attend_without_gradients = attend_without_gradients or attend
        self.model = model.to(device=self.device, dtype=dtype or model.dtype).eval().requires_grad_(False)
        self.dtype: torch.dtype = self.model.dtype
        self.body = self.model.get_decoder() if hasattr(self.model, "get_decoder") else self.model.base_model
        self.head = self.model.get_output_embeddings()
        self.embedding = self.model.get_input_embeddings()
        config = self.model.config.get_text_config()
        _refuse_unsupported(config)
        # Ordinary tokens: bf16 is far less exact on a run of special ones.
        probe = config.vocab_size // 2 + torch.arange(12, device=self.device)[None] * (config.vocab_size // 32)
        self.model.set_attn_implementation("eager")
        with torch.no_grad():
            expected = self.model(input_ids=probe, use_cache=False).logits
        self.model.set_attn_implementation(ATTENTION_NAME)
        self.geometry, self.scale = self._measure(config, probe, expected)
        self.window = int(getattr(config, "max_position_embeddings", 0) or 1 << 30)

    def _measure(self, config: Any, probe: Tensor, expected: Tensor) -> tuple[Geometry, float]:
        """Run the probe as a prefix and what follows it; compare with the model's own logits."""
        traces: list[LayerTrace] = []
        cut = probe.shape[1] // 2
        with torch.no_grad():
            self.forward(self.embed(probe), None, on_layer=lambda _, trace: traces.append(trace))
            if len(traces) != config.num_hidden_layers:
                raise ValueError(f"{type(self.model).__name__} does not use the attention interface in every layer")
            prefix = self.encode(probe[0, :cut].tolist())
            behind = self.embed(probe[:, cut:])
            with torch.enable_grad():  # as training attends, with weights that need no gradients
                hidden = [self.forward(behind, prefix)]
            hidden.append(self.forward(behind, prefix))
            wanted = expected[:, cut:].float()
            size = wanted.norm().clamp_min(1e-6)
            errors = [float((self.project(states).float() - wanted).norm() / size) for states in hidden]
        allowed = 1e-3 if self.dtype in (torch.float32, torch.float64) else 0.1
        if not all(error <= allowed for error in errors):  # NaN is none
            raise ValueError(
                f"{type(self.model).__name__}: the logits behind a prefix differ from the model's own; "
                "soft prompts cannot be trained for it"
            )
        key, query = traces[0].key, traces[0].query
        heads, kv_heads, size = query.shape[1], key.shape[1], key.shape[3]
        shape = Geometry(len(traces), heads, kv_heads, size, behind.shape[-1], expected.shape[-1])
        return shape, traces[0].scale

    def wait(self) -> None:
        """Until the device has done all it was asked to: a clock read before would not know of it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def embed(self, ids: Tensor) -> Tensor:
        """Input embeddings [..., hidden] of token ids."""
        embedded: Tensor = self.embedding(ids)
        return embedded

    def project(self, hidden: Tensor) -> Tensor:
        """Logits [..., vocab] of last hidden states."""
        logits: Tensor = self.head(hidden)
        return logits

    def project_wide(self, hidden: Tensor) -> Tensor:
        """Logits in float32 at least: bf16 logits tie, and a tie is no agreement."""
        wide = torch.promote_types(hidden.dtype, torch.float32)
        bias = getattr(self.head, "bias", None)
        return F.linear(hidden.to(wide), self.head.weight.to(wide), None if bias is None else bias.to(wide))

    def forward(
        self,
        embeds: Tensor,
        prefix: Prefix | None,
        on_layer: Callable[[int, LayerTrace], None] | None = None,
        cache: DecodeCache | None = None,
    ) -> Tensor:
        """Last hidden states [batch, tokens, hidden] of right-padded rows that follow `prefix`."""
        first = prefix.length if prefix is not None else 0
        if cache is not None:
            positions = (first + cache.lengths)[:, None]
        else:
            positions = torch.arange(first, first + embeds.shape[1], device=embeds.device)[None]
        layered = LayeredPrefix.of(prefix, self.dtype) if prefix is not None else None
        output = self.body(
            inputs_embeds=embeds,
            position_ids=positions,
            use_cache=False,
            call=AttentionCall(
                attend if torch.is_grad_enabled() else self.attend_without_gradients, layered, on_layer, cache
            ),
        )
        hidden: Tensor = output.last_hidden_state
        return hidden

    def prefill(self, embeds: Tensor) -> Prefix:
        """The KV of one row of embeddings [n, hidden] at positions 0..n-1; differentiable."""
        keys: list[Tensor] = []
        values: list[Tensor] = []

        def keep(_: int, trace: LayerTrace) -> None:
            keys.append(trace.key[0].transpose(0, 1))
            values.append(trace.value[0].transpose(0, 1))

        self.forward(embeds[None].to(self.dtype), None, on_layer=keep)
        return Prefix(torch.stack(keys), torch.stack(values))

    @torch.no_grad()
    def encode(self, ids: Sequence[int]) -> Prefix:
        """The KV of a run of tokens."""
        return self.prefill(self.embed(torch.tensor(list(ids), device=self.device)))
