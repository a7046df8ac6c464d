"""What soft prompts are trained through on CPUs: a frozen Llama-like model, with gradients in what stands before it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from softbatch.prompt_store.compression.frozen.prefix import AttendInLayer
from softbatch.scheduler.model.cpu import ops
from softbatch.scheduler.model.cpu.build import build as build_kernels
from softbatch.scheduler.model.llama.decoder import plain_weights, release_linears, supports
from softbatch.scheduler.model.llama.description import FAMILIES, is_plain, layer_weights

DTYPES = (torch.float32, torch.bfloat16)


def kernels_of(model: Any) -> CpuModelKernels | None:
    """The model, whose layers' own weights go; None where these kernels do not compute it. Builds the kernels."""
    if not (supports(model, model.dtype) and is_plain(model) and build_kernels()):
        return None
    if model.lm_head.weight.shape[0] % 2:  # the objective's gradient takes the vocabulary's numbers by twos
        return None
    return CpuModelKernels(model)


class CpuModelKernels:
    """`ModelKernels` of Llama-like models: all layers and the last norm, and the objective behind them.

    The weights are constants, of which this has its own copy, and one transposed, instead of the layers' own. The
    residual stream is float32, as where the model serves. Not for several threads at once.
    """

    def __init__(self, model: Any) -> None:
        config, weights = model.config, plain_weights(model.dtype)
        first = model.model.layers[0].self_attn
        self._num_layers = config.num_hidden_layers
        self._rotary, self._norm, self._scale = model.model.rotary_emb, model.model.norm, float(first.scaling)
        self._layers = ops.make_layers(
            weights, config.num_attention_heads, config.num_key_value_heads, first.head_dim, config.rms_norm_eps
        )
        for layer in model.model.layers:
            self._layers.add_layer(layer_weights(layer, FAMILIES[type(model).__name__]))
            release_linears(layer)
        self._objective = ops.make_objective(weights, model.lm_head.weight, model.lm_head.bias)

    def run_layers(self, embeds: Tensor, positions: Tensor, attend: AttendInLayer) -> Tensor:
        """Last hidden states of embeddings [batch, tokens, hidden] at `positions` [1 or batch, tokens]; differentiable
        in the embeddings, and through attention, which the caller computes."""
        batch, tokens, size = embeds.shape
        cosines, sines = (_halves(turn, batch) for turn in self._rotary(embeds.float(), positions))
        hidden = embeds.float().reshape(-1, size).contiguous()
        for layer in range(self._num_layers):
            query, key, value = _IntoAttention.apply(hidden, self._layers, layer, batch, cosines, sines)  # type: ignore[no-untyped-call]
            attended = attend(layer, query, key, value, self._scale)
            hidden = _BehindAttention.apply(hidden, attended, self._layers, layer)  # type: ignore[no-untyped-call]
        normed: Tensor = self._norm(hidden).to(embeds.dtype).view(batch, tokens, size)
        return normed

    def objective(self, student: Tensor, teacher: Tensor | None, gold: Tensor, alpha: float) -> Tensor:
        return objective(self._objective, student, teacher, gold, alpha)


def objective(kernel: Any, student: Tensor, teacher: Tensor | None, gold: Tensor, alpha: float) -> Tensor:
    """The mean over positions of alpha · nll + (1 − alpha) · kl, from last hidden states [positions, hidden];
    differentiable in the student's. Raises RuntimeError for tensors that do not fit."""
    loss: Tensor = _Objective.apply(student, teacher, gold, kernel, alpha)  # type: ignore[no-untyped-call]
    return loss


def behind_prefix_with_gradients(
    query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, scale: float
) -> Tensor:
    """Causal attention of rows over a prefix that all of them share, then their own tokens; differentiable in all.

    `query` [batch, heads, tokens, head_dim]; `key`, `value` [batch, kv_heads, tokens, head_dim]; `keys`, `values`
    [kv_heads, n, head_dim] of the prefix, in float32 or bfloat16; returns the query's shape. Within it is float32. The
    kernels must have been built.
    """
    out: Tensor = _BehindPrefix.apply(query, key, value, keys, values, scale)  # type: ignore[no-untyped-call]
    return out


def _halves(turn: Tensor, batch: int) -> Tensor:
    """Both halves of a head are turned alike: [batch * tokens, head_dim / 2]."""
    half = turn[..., : turn.shape[-1] // 2]
    return half.expand(batch, -1, -1).reshape(-1, half.shape[-1]).contiguous()


class _IntoAttention(torch.autograd.Function):
    """From the residual stream [rows, hidden] to queries, keys and values, turned by their positions."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, layers: Any, layer: int, batch: int, cosines: Tensor, sines: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(hidden, cosines, sines)
        ctx.layers, ctx.layer = layers, layer
        return tuple(layers.into_attention(layer, hidden, cosines, sines, batch))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        given = [gradient.contiguous() for gradient in gradients]
        found = ctx.layers.into_attention_backward(ctx.layer, *ctx.saved_tensors, given)
        return found, None, None, None, None, None


class _BehindAttention(torch.autograd.Function):
    """From the residual stream and what attention gives to the residual stream behind the layer."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, attended: Tensor, layers: Any, layer: int) -> Tensor:
        middle, behind, gate_up = layers.behind_attention(layer, hidden, attended.contiguous())
        ctx.save_for_backward(middle, gate_up)
        ctx.layers, ctx.layer, ctx.batch = layers, layer, attended.shape[0]
        found: Tensor = behind
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        given = gradients[0].contiguous()
        hidden, attended = ctx.layers.behind_attention_backward(ctx.layer, *ctx.saved_tensors, given, ctx.batch)
        return hidden, attended, None, None


class _BehindPrefix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        *tensors, scale = inputs
        tensors = [tensor.contiguous() for tensor in tensors]
        out, weights = ops.prefix_attention(tensors, scale)
        ctx.save_for_backward(*tensors, weights)
        ctx.scale = scale
        attended: Tensor = out
        return attended

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, weights = ctx.saved_tensors
        found = ops.prefix_attention_backward(tensors, ctx.scale, weights, gradients[0].contiguous())
        return *found, None


class _Objective(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor | None, gold: Tensor, objective: Any, alpha: float
    ) -> Tensor:
        given = teacher.to(student.dtype).contiguous() if teacher is not None and alpha < 1 else None
        loss, gradient = objective.mean(student.contiguous(), given, gold.contiguous(), alpha)
        ctx.save_for_backward(gradient)
        ctx.dtype = student.dtype
        mean: Tensor = loss
        return mean

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * gradients[0]).to(ctx.dtype), None, None, None, None
