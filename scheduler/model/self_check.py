"""Refuses at load what paged attention would get wrong, by comparing with transformers' own attention."""

from __future__ import annotations

from typing import Any

import torch

from scheduler.model.batch import Row
from scheduler.model.interface import ATTENTION_NAME
from scheduler.model.runner import Runner

LENGTH = 24
CUT = 17


@torch.inference_mode()
def self_check(model: Any, runner: Runner, block_size: int, quantized: bool = False) -> None:
    """Run one short sequence in two chunks through the paged cache and whole through eager attention.

    Raises RuntimeError when the logits disagree beyond rounding: the architecture does something (a window, a bias, a
    score cap) that does not pass through the attention interface.
    """
    device = model.get_input_embeddings().weight.device
    vocab = model.get_input_embeddings().weight.shape[0]
    tokens = [(7919 * (i + 1)) % vocab for i in range(LENGTH)]
    blocks = list(range(-(-LENGTH // block_size)))
    runner.forward([Row(0, tokens[:CUT], blocks, range(0))])
    paged = runner.forward([Row(CUT, tokens[CUT:], blocks, range(LENGTH - CUT - 1, LENGTH - CUT))])[0].float()
    model.set_attn_implementation("eager")
    try:
        positions = torch.arange(LENGTH, device=device)[None]
        output = model(torch.tensor([tokens], device=device), position_ids=positions, use_cache=False)
    finally:
        model.set_attn_implementation(ATTENTION_NAME)
    eager = output.logits[0, -1].float()
    spread = float((eager - eager.mean()).norm())
    error = float((paged - eager).norm()) / max(spread, 1e-6)
    allowed = 0.4 if quantized else 1e-3 if output.logits.dtype == torch.float32 else 0.3
    if not error <= allowed:
        raise RuntimeError(
            f"its logits through paged attention are {error:.1%} off transformers' own (at most {allowed:.1%} allowed)"
        )
