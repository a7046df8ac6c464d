"""The one signature of every forward pass: from a step's ragged batch to its logits or its hidden states."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from softbatch.scheduler.model.attention.backend import AttentionBackend
from softbatch.scheduler.model.batch import RaggedBatch
from softbatch.scheduler.model.kv_cache import KVCache
from softbatch.scheduler.model.rotary import RotaryByLength
from softbatch.scheduler.model.transformers_attention import PagedForward


class Forward(Protocol):
    """Runs the model over a step's tokens, writing their keys and values into the paged cache.

    Returns the logits of `batch.logit_rows`: [R, vocab], valid until the next call.
    """

    def __call__(self, batch: RaggedBatch) -> torch.Tensor: ...

    def hidden_states(self, batch: RaggedBatch) -> torch.Tensor:
        """The same up to the last norm, whose output at `batch.logit_rows` this is: [R, hidden]. No head is run."""
        ...


class TransformersForward:
    """Runs any `transformers` model by its own modelling code, with our attention inside."""

    def __init__(self, model: Any, kv_cache: KVCache, backend: AttentionBackend, longest: int | None = None) -> None:
        """No sequence has more than `longest` tokens; None: it is not known."""
        self._model = model
        self._embed = model.get_input_embeddings()
        self._kv_cache = kv_cache
        self._backend = backend
        self._longest = longest
        self._rotary = RotaryByLength(model)

    def __call__(self, batch: RaggedBatch) -> torch.Tensor:
        with self._rotary.of(batch.lengths):
            logits: torch.Tensor = self._model(**self._inputs(batch), logits_to_keep=batch.logit_rows).logits[0]
        return logits

    def hidden_states(self, batch: RaggedBatch) -> torch.Tensor:
        with self._rotary.of(batch.lengths):
            states: torch.Tensor = self._model.base_model(**self._inputs(batch)).last_hidden_state[0]
        return states[batch.logit_rows]

    def _inputs(self, batch: RaggedBatch) -> dict[str, Any]:
        inputs = self._embed(batch.token_ids)
        for first, embeddings in batch.embeddings:
            inputs[first : first + embeddings.shape[0]] = embeddings
        return {
            "inputs_embeds": inputs[None],
            "position_ids": batch.positions[None],
            "use_cache": False,
            "paged": PagedForward(self._kv_cache, batch.attention, self._backend, self._longest),
        }
