"""The frozen model as compression sees it: one forward, with a prefix in front.

Teacher (full context), student (σ) and every baseline are the same forward over a different `Prefix`, so that, but for
rounding, a difference in logits can only come from the prefix itself. `Kernels` may compute its parts otherwise; where
no gradients are needed attention may be one more implementation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from softbatch.prompt_store.compression.frozen.layer_kinds import (
    longest_of_one_kind,
    narrow_windows,
    rotary_kinds_of,
    windows_of,
)
from softbatch.prompt_store.compression.frozen.prefix import (
    ATTENTION_NAME,
    Attend,
    AttendInLayer,
    AttentionCall,
    DecodeCache,
    LayeredPrefix,
    LayerTrace,
    Prefix,
    attend,
    attend_in_layer,
)
from softbatch.prompt_store.compression.objectives import objective_from_hidden
from softbatch.prompt_store.float32 import (
    MAX_ERROR_IN_FLOAT32,
    allowed_error,
    computing_in_float32,
    relative_error,
)


class ModelKernels(Protocol):
    """A model's layers, and what σ is trained for behind them."""

    def run_layers(self, embeds: Tensor, positions: Tensor, attend: AttendInLayer) -> Tensor:
        """Last hidden states of embeddings [batch, tokens, hidden] at `positions` [1 or batch, tokens]; differentiable
        in the embeddings and through attention."""
        ...

    def objective(self, student: Tensor, teacher: Tensor | None, gold: Tensor, alpha: float) -> Tensor:
        """`objective_from_hidden` behind this model."""
        ...


@dataclass(frozen=True)
class Kernels:
    """What computes the parts of the forward; by default plain torch and transformers, anywhere.

    `attend_without_gradients` is an `attend` for where none are needed. `of_model` makes of a model its kernels, for
    which it may take the model's own layers apart, or None where it cannot.
    """

    attend: Attend = attend
    attend_without_gradients: Attend = attend
    of_model: Callable[[Any], ModelKernels | None] = lambda _: None


@dataclass(frozen=True)
class ThroughTransformers:
    """`ModelKernels` of any model."""

    body: Any
    head: Any

    def run_layers(self, embeds: Tensor, positions: Tensor, attend: AttendInLayer) -> Tensor:
        output = self.body(inputs_embeds=embeds, position_ids=positions, use_cache=False, call=attend)
        hidden: Tensor = output.last_hidden_state
        return hidden

    def objective(self, student: Tensor, teacher: Tensor | None, gold: Tensor, alpha: float) -> Tensor:
        return objective_from_hidden(student, teacher, gold, self.head, alpha)


@dataclass(frozen=True)
class Geometry:
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    vocab: int


class Decoder:
    """A transformers causal LM with frozen weights; owns the model (its attention function is replaced).

    Raises ValueError for a model whose logits are not `lm_head(last hidden state)`, which does not pass its
    attention through the attention interface, or whose attention is neither full nor full within windows. σ is a real
    prefix: its n slots are the positions 0 to n − 1, which a layer with a window sees no longer than others.
    """

    def __init__(
        self,
        model: Any,
        device: str | torch.device = "cpu",
        kernels: Kernels | None = None,
    ) -> None:
        self.device = torch.device(device)
        # Never to another dtype: that would round the rotary frequencies, which are float32 in every model, as well.
        self.model = model.to(self.device).eval().requires_grad_(False)
        self.body = self.model.get_decoder() if hasattr(self.model, "get_decoder") else self.model.base_model
        self.head = self.model.get_output_embeddings()
        self.embedding = self.model.get_input_embeddings()
        config = self.model.config.get_text_config()
        windows = windows_of(config)
        self.rotary_kinds = rotary_kinds_of(self.body, config)
        # Ordinary tokens: bf16 is far less exact on a run of special ones.
        probe = config.vocab_size // 2 + torch.arange(12, device=self.device)[None] * (config.vocab_size // 32)
        self.kernels = Kernels()
        self._model_kernels: ModelKernels = ThroughTransformers(self.body, self.head)
        self.dtype: torch.dtype = torch.promote_types(self.model.dtype, torch.float32)
        with narrow_windows(config, windows) as self.windows:
            self._check(config, probe, kernels)
        self.windows = windows
        self.window = longest_of_one_kind(config) or 1 << 30

    def _check(self, config: Any, probe: Tensor, kernels: Kernels | None) -> None:
        """Measure the model, and take what computes it. Raises ValueError where that is not as transformers does."""
        with computing_in_float32(self.model):
            expected = self._own_logits(probe)
            self.geometry, self.scale = self._measure(config, probe, expected)
            self._refuse_difference(self._error_behind_prefix(probe, expected), MAX_ERROR_IN_FLOAT32)
        self.dtype = self.model.dtype
        rounding = self._error_behind_prefix(probe, expected)  # what a right way to compute it costs in this dtype
        self.kernels = kernels or self.kernels
        self._model_kernels = self.kernels.of_model(self.model) or self._model_kernels
        self._refuse_difference(self._error_behind_prefix(probe, expected), allowed_error(rounding, self.dtype))

    @torch.no_grad()
    def _own_logits(self, probe: Tensor) -> Tensor:
        """As transformers computes them."""
        self.model.set_attn_implementation("eager")
        logits: Tensor = self.model(input_ids=probe, use_cache=False).logits
        self.model.set_attn_implementation(ATTENTION_NAME)
        return logits

    @torch.no_grad()
    def _measure(self, config: Any, probe: Tensor, expected: Tensor) -> tuple[Geometry, float]:
        """What attention is called with. Raises ValueError where it is not called in every layer."""
        traces: list[LayerTrace] = []
        hidden = self.forward(self.embed(probe), None, on_layer=lambda _, trace: traces.append(trace))
        if len(traces) != config.num_hidden_layers:
            raise ValueError(f"{type(self.model).__name__} does not use the attention interface in every layer")
        key, query = traces[0].key, traces[0].query
        heads, kv_heads, size = query.shape[1], key.shape[1], key.shape[3]
        shape = Geometry(len(traces), heads, kv_heads, size, hidden.shape[-1], expected.shape[-1])
        return shape, traces[0].scale

    @torch.no_grad()
    def _error_behind_prefix(self, probe: Tensor, expected: Tensor) -> float:
        """Run the probe as a prefix and what follows it, with gradients and without; the larger distance from expected
        logits."""
        cut = probe.shape[1] // 2
        prefix = self.encode(probe[0, :cut].tolist())
        behind = self.embed(probe[:, cut:])
        with torch.enable_grad():  # as training attends, with weights that need no gradients
            hidden = [self.forward(behind, prefix).detach()]
        hidden.append(self.forward(behind, prefix))
        errors = [relative_error(self.project(states), expected[:, cut:]) for states in hidden]
        return max(errors, key=lambda error: math.inf if math.isnan(error) else error)

    def _refuse_difference(self, error: float, allowed: float) -> None:
        if not error <= allowed:  # NaN is none
            raise ValueError(
                f"{type(self.model).__name__}: the logits behind a prefix differ from the model's own in float32 by "
                f"{error:.2%} (at most {allowed:.2%} allowed); soft prompts cannot be trained for it"
            )

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
        kernels = self.kernels
        call = AttentionCall(
            kernels.attend if torch.is_grad_enabled() else kernels.attend_without_gradients,
            layered,
            on_layer,
            cache,
            int(cache.lengths.max()) + 1 if cache is not None else 0,  # a device is asked once, not in every layer
            self.windows,
        )
        return self._model_kernels.run_layers(embeds, positions, partial(attend_in_layer, call))

    def objective(self, student: Tensor, teacher: Tensor | None, gold: Tensor, alpha: float) -> Tensor:
        """The mean of what σ is trained for over positions (`objective_from_hidden`), differentiable in `student`."""
        return self._model_kernels.objective(student, teacher, gold, alpha)

    def prefill(self, embeds: Tensor, before: Prefix | None = None) -> Prefix:
        """The KV of `before`, if there is any, and of one row of embeddings [n, hidden] behind it; differentiable."""
        keys: list[Tensor] = []
        values: list[Tensor] = []

        def keep(_: int, trace: LayerTrace) -> None:
            keys.append(trace.key[0].transpose(0, 1))
            values.append(trace.value[0].transpose(0, 1))

        self.forward(embeds[None].to(self.dtype), before, on_layer=keep)
        found = Prefix(torch.stack(keys), torch.stack(values))
        if before is None:
            return found
        start = before.to(self.dtype)
        return Prefix(torch.cat((start.keys, found.keys), dim=1), torch.cat((start.values, found.values), dim=1))

    @torch.no_grad()
    def encode(self, ids: Sequence[int], before: Prefix | None = None) -> Prefix:
        """The KV of a run of tokens, behind `before` if there is any."""
        return self.prefill(self.embed(torch.tensor(list(ids), device=self.device)), before)
