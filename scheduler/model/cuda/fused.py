"""Decoders of the Llama family in few kernels: fused ones of ours between the matrix products."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from softbatch.scheduler.model.attention.tiles import next_power_of_two
from softbatch.scheduler.model.attention.triton import TritonAttention
from softbatch.scheduler.model.batch import RaggedBatch
from softbatch.scheduler.model.kv_cache import KVCache
from softbatch.scheduler.model.rotary import RotaryByLength

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
# Rotary embeddings whose frequencies do not depend on the length, or only on whether a sequence is a long one.
_ROTARY = ("default", "linear", "llama3", "yarn", "longrope")
_SILU_COLUMNS = 1024


@dataclass(frozen=True)
class _Layer:
    input_norm: torch.Tensor
    qkv: torch.Tensor
    qkv_bias: torch.Tensor | None
    query_norm: torch.Tensor | None
    key_norm: torch.Tensor | None
    output: torch.Tensor
    output_bias: torch.Tensor | None
    post_norm: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor


def supports(model: Any) -> bool:
    """Whether `FusedForward` computes what the model does. The self-check at load compares the results."""
    if type(model).__name__ not in ARCHITECTURES:
        return False
    config = model.config
    layers = model.model.layers
    return (
        config.hidden_act == "silu"
        and not getattr(config, "mlp_bias", False)
        and getattr(config, "partial_rotary_factor", None) in (None, 1.0)
        and (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default") in _ROTARY
        and _head_dim(config) % 2 == 0
        and all(type(part) is nn.Linear for layer in layers for part in _linears(layer))
        and type(model.lm_head) is nn.Linear
    )


class FusedForward:
    """`Forward` for `ARCHITECTURES`: the same numbers as transformers', rounded in the same places.

    Weights with a common input are merged. The model's own weights become views of the merged ones, so that none is in
    memory twice and transformers' code still runs.
    """

    def __init__(self, model: Any, kv_cache: KVCache, attention: TritonAttention) -> None:
        from softbatch.scheduler.model.cuda import fused_kernels as triton_kernels

        config = model.config
        self._kernels = triton_kernels
        self._kv_cache = kv_cache
        self._attention = attention
        self._heads, self._kv_heads = config.num_attention_heads, config.num_key_value_heads
        self._head_dim = _head_dim(config)
        self._scale = self._head_dim**-0.5
        self._eps: float = config.rms_norm_eps
        self._embed = model.get_input_embeddings()
        self._rotary: Callable[..., tuple[torch.Tensor, torch.Tensor]] = model.model.rotary_emb
        self._by_length = RotaryByLength(model)
        self._layers = [_merge(layer) for layer in model.model.layers]
        self._norm: torch.Tensor = model.model.norm.weight
        self._lm_head = model.lm_head

    def __call__(self, batch: RaggedBatch) -> torch.Tensor:
        logits: torch.Tensor = self._lm_head(self.hidden_states(batch))
        return logits

    def hidden_states(self, batch: RaggedBatch) -> torch.Tensor:
        hidden = self._embed(batch.token_ids)
        for first, embeddings in batch.embeddings:
            hidden[first : first + embeddings.shape[0]] = embeddings
        with self._by_length.of(batch.lengths):
            turns = self._rotary(hidden[None], batch.positions[None])
        cos, sin = (part[0].contiguous() for part in turns)
        delta: torch.Tensor | None = None
        for index, layer in enumerate(self._layers):
            normed = self._add_norm(hidden, delta, layer.input_norm)
            attended = self._attend(index, layer, linear(normed, layer.qkv, layer.qkv_bias), cos, sin, batch)
            delta = linear(attended.flatten(1), layer.output, layer.output_bias)
            normed = self._add_norm(hidden, delta, layer.post_norm)
            delta = linear(self._activate(linear(normed, layer.gate_up)), layer.down)
        rows = batch.logit_rows
        return self._add_norm(hidden[rows], None if delta is None else delta[rows], self._norm)

    def _add_norm(self, hidden: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor) -> torch.Tensor:
        """Add delta to hidden in place and return the normalised sum."""
        out = torch.empty_like(hidden)
        tokens, size = hidden.shape
        if tokens:
            self._kernels.add_rms_norm[(tokens,)](
                hidden,
                hidden if delta is None else delta,
                weight,
                out,
                self._eps,
                SIZE=size,
                BLOCK=next_power_of_two(size),
                ADD=delta is not None,
                num_warps=4 if size <= 2048 else 8,
            )
        return out

    def _attend(
        self,
        index: int,
        layer: _Layer,
        qkv: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        batch: RaggedBatch,
    ) -> torch.Tensor:
        key_cache, value_cache = self._kv_cache.keys[index], self._kv_cache.values[index]
        tokens = qkv.shape[0]
        query = torch.empty((tokens, self._heads, self._head_dim), dtype=qkv.dtype, device=qkv.device)
        has_norm = layer.query_norm is not None
        self._kernels.rotate_and_write[(tokens,)](
            qkv,
            cos,
            sin,
            layer.query_norm if has_norm else qkv,
            layer.key_norm if has_norm else qkv,
            self._eps,
            query,
            key_cache,
            value_cache,
            batch.attention.slot_mapping,
            key_cache.stride(0),
            key_cache.stride(1),
            HEADS=self._heads,
            KV_HEADS=self._kv_heads,
            HEAD_DIM=self._head_dim,
            BLOCK_SIZE=self._kv_cache.block_size,
            BLOCK_Q=next_power_of_two(self._heads),
            BLOCK_KV=next_power_of_two(self._kv_heads),
            BLOCK_HALF=next_power_of_two(self._head_dim // 2),
            NORM=has_norm,
            num_warps=4,
        )
        return self._attention.attend(query, key_cache, value_cache, batch.attention, self._scale)

    def _activate(self, gate_up: torch.Tensor) -> torch.Tensor:
        tokens, size = gate_up.shape[0], gate_up.shape[1] // 2
        out = torch.empty((tokens, size), dtype=gate_up.dtype, device=gate_up.device)
        self._kernels.silu_and_multiply[(tokens, -(-size // _SILU_COLUMNS))](
            gate_up, out, SIZE=size, BLOCK=_SILU_COLUMNS, num_warps=4
        )
        return out


def _linears(layer: Any) -> list[Any]:
    attention, mlp = layer.self_attn, layer.mlp
    return [
        attention.q_proj,
        attention.k_proj,
        attention.v_proj,
        attention.o_proj,
        mlp.gate_proj,
        mlp.up_proj,
        mlp.down_proj,
    ]


def _merge(layer: Any) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    qkv = [attention.q_proj, attention.k_proj, attention.v_proj]
    has_norm = hasattr(attention, "q_norm")
    return _Layer(
        input_norm=layer.input_layernorm.weight,
        qkv=_merged([part.weight for part in qkv]),
        qkv_bias=_merged([part.bias for part in qkv]) if qkv[0].bias is not None else None,
        query_norm=attention.q_norm.weight if has_norm else None,
        key_norm=attention.k_norm.weight if has_norm else None,
        output=attention.o_proj.weight,
        output_bias=attention.o_proj.bias,
        post_norm=layer.post_attention_layernorm.weight,
        gate_up=_merged([mlp.gate_proj.weight, mlp.up_proj.weight]),
        down=mlp.down_proj.weight,
    )


@torch.no_grad()
def _merged(parameters: list[torch.Tensor]) -> torch.Tensor:
    """Merge the weights into one tensor and make them views of it. Idempotent."""
    first = parameters[0]
    whole = getattr(first, "merged_into", None)
    if whole is None:
        whole = torch.cat([parameter.data for parameter in parameters])
        for parameter, view in zip(parameters, whole.split([len(p) for p in parameters]), strict=True):
            parameter.data = view
        first.merged_into = whole  # type: ignore[attr-defined]
    found: torch.Tensor = whole
    return found


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
