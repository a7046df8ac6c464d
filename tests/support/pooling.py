"""Requests for embeddings, and what plain transformers makes of their tokens."""

from __future__ import annotations

import torch

from softbatch.prompt_store.soft_prompt_file import SoftPrompt
from softbatch.scheduler.protocol import AddRequest, Pooling, SamplingParams, SoftPromptRef
from tests.support.models import Reference


def embedding_request(
    name: str, token_ids: list[int], pooling: Pooling, soft_prompt: SoftPromptRef | None = None
) -> AddRequest:
    return AddRequest(
        request_id=name,
        token_ids=token_ids,
        params=SamplingParams(max_tokens=0),
        soft_prompt=soft_prompt,
        score_from=len(token_ids),
        pooling=pooling,
    )


@torch.inference_mode()
def pooled_states(
    reference: Reference, token_ids: list[int], pooling: Pooling, prompt: SoftPrompt | None = None
) -> list[float]:
    """Of the model's last hidden states; a prompt has embeddings, and is no part of the mean."""
    inputs = reference.model.get_input_embeddings()(torch.tensor([token_ids]))
    if prompt is not None:
        inputs = torch.cat([prompt.embeddings[None], inputs], dim=1)
    states = reference.model(inputs_embeds=inputs, output_hidden_states=True).hidden_states[-1][0, -len(token_ids) :]
    return (states.mean(0) if pooling == "mean" else states[-1]).tolist()
