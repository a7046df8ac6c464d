"""Refuses at load what paged attention would get wrong, by comparing with transformers' own attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from softbatch.scheduler.model.batch import Row
from softbatch.scheduler.model.runner import Runner
from softbatch.scheduler.model.transformers_attention import ATTENTION_NAME

LENGTH = 24
CHUNKS = (17, 6, 1)  # the last is a decoding step


def _tokens(vocab: int) -> list[int]:
    return [(7919 * (i + 1)) % vocab for i in range(LENGTH)]


@torch.inference_mode()
def eager_logits(model: Any) -> torch.Tensor:
    """What `self_check` compares with: [vocab] after a short sequence, through transformers' own attention."""
    embed = model.get_input_embeddings().weight
    model.set_attn_implementation("eager")
    try:
        positions = torch.arange(LENGTH, device=embed.device)[None]
        tokens = torch.tensor([_tokens(embed.shape[0])], device=embed.device)
        logits: torch.Tensor = model(tokens, position_ids=positions, use_cache=False).logits[0, -1]
    finally:
        model.set_attn_implementation(ATTENTION_NAME)
    return logits


@torch.inference_mode()
def self_check(
    expected: torch.Tensor, runner: Runner, vocab: int, block_size: int, rounded_by: Sequence[str] = ()
) -> None:
    """Run the same sequence in chunks through the paged cache; `expected` are the `eager_logits`, `rounded_by` the
    options that round more than the model's dtype.

    Raises RuntimeError when the logits disagree beyond rounding: the architecture does something (a window, a bias, a
    score cap) that does not pass through the attention interface.
    """
    tokens, blocks, start = _tokens(vocab), list(range(-(-LENGTH // block_size))), 0
    for count in CHUNKS:
        row = Row(start, tokens[start : start + count], blocks, range(count - 1, count))
        paged = runner.forward([row])[0].float()
        start += count
    eager = expected.float()
    spread = float((eager - eager.mean()).norm())
    error = float((paged - eager).norm()) / max(spread, 1e-6)
    allowed = 0.4 if rounded_by else 1e-3 if expected.dtype == torch.float32 else 0.3
    if not error <= allowed:
        advice = f"; try without {' '.join(rounded_by)}" if rounded_by else ""
        raise RuntimeError(
            f"its logits through paged attention are {error:.1%} off transformers' own (at most {allowed:.1%} "
            f"allowed){advice}"
        )
