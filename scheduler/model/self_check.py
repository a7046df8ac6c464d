"""Refuses at load what paged attention would get wrong, by comparing with transformers' own attention in float32."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from softbatch.prompt_store.float32 import (
    MAX_ERROR_IN_FLOAT32,
    allowed_error,
    computing_in_float32,
    relative_error,
)
from softbatch.prompt_store.manifest import ModelSpec
from softbatch.scheduler.model.attention.reference import reference
from softbatch.scheduler.model.batch import Row, build_batch
from softbatch.scheduler.model.family import Family
from softbatch.scheduler.model.forward import TransformersForward
from softbatch.scheduler.model.kv_cache import KVCache
from softbatch.scheduler.model.routing import ExpertChoice, followed_choices, recorded_choices
from softbatch.scheduler.model.runner import Runner
from softbatch.scheduler.model.transformers_attention import ATTENTION_NAME

LENGTH = 24
CHUNKS = (17, 6, 1)  # the last is a decoding step
BLOCK_SIZE = 8
WINDOW = 10  # of the layers that have one, during the check: LENGTH tokens would never meet their own
# What options that round more than the dtype may cost: nats between predictions, on average over a text.
MAX_DIVERGENCE = 0.1
# More than LENGTH tokens for any tokenizer.
TEXT = (
    "The town by the harbour wakes early. While the fishermen mend their nets beside the quay, the baker across the "
    "street opens her shutters, and the smell of fresh bread drifts slowly over the water."
)


@dataclass(frozen=True, eq=False)
class Yardstick:
    """`logits` [LENGTH, vocab] of a short sequence in float32, and how far the same in the model's dtype is off.
    `choices` are the experts that tokens are sent to; none in a model without experts."""

    tokens: Sequence[int]
    logits: torch.Tensor
    choices: Sequence[ExpertChoice]
    rounding: float
    dtype: torch.dtype


def check_tokens(tokenizer: Any, rows: int) -> list[int]:
    """A text as the model meets it, since rounding costs more or less by what is said; pseudo-random tokens where the
    tokenizer or an embedding of so many rows has too few for it: equal ones would hide masks and positions."""
    found = [token for token in tokenizer(TEXT)["input_ids"] if token < rows][:LENGTH]
    if len(found) == LENGTH and len(set(found)) >= LENGTH // 2:
        return found
    return [(7919 * (i + 1)) % rows for i in range(LENGTH)]


def has_short_windows(family: Family, longest: int) -> bool:
    """Whether `short_windows` shortens any."""
    return any(family.windows_within(longest))


@contextmanager
def short_windows(model: Any, longest: int) -> Iterator[int | None]:
    """Meanwhile windows that sequences of `longest` tokens reach the end of are WINDOW tokens, both in the masks that
    transformers makes and in what its layers ask our attention for; yields WINDOW if there are any.

    Raises RuntimeError where a layer asks for another window than config.json does.
    """
    config = model.config.get_text_config()
    family = Family.of(config)
    window = next(filter(None, family.windows_within(longest)), None)
    if window is None:
        yield None
        return
    holders = [config]
    for module in model.modules():
        layer, asked = getattr(module, "layer_idx", None), getattr(module, "sliding_window", None)
        if layer is None or asked is None:
            continue
        if asked != family.windows[layer]:
            raise RuntimeError(f"layer {layer} sees {asked} tokens, but by config.json {family.windows[layer]}")
        holders.append(module)
    for holder in holders:
        holder.sliding_window = WINDOW
    try:
        yield WINDOW
    finally:
        for holder in holders:
            holder.sliding_window = window


@torch.inference_mode()
def measure(model: Any, spec: ModelSpec, tokenizer: Any) -> Yardstick:
    """What `self_check` compares with; takes the weights as transformers has laid them out. Windows are as they are:
    `short_windows` makes them such that the check meets them.

    Raises RuntimeError when paged attention disagrees with transformers' own in float32: the architecture does
    something (a mask, a bias, a score cap) that does not pass through the attention interface.
    """
    tokens = check_tokens(tokenizer, model.get_input_embeddings().weight.shape[0])
    with computing_in_float32(model):
        with recorded_choices() as choices:
            logits = _eager(model, tokens)
        error = relative_error(_paged(model, spec, tokens, choices, torch.float32), logits)
    if not error <= MAX_ERROR_IN_FLOAT32:
        raise RuntimeError(
            f"its logits through paged attention are {error:.2%} off transformers' own in float32 (at most "
            f"{MAX_ERROR_IN_FLOAT32:.1%} allowed)"
        )
    if model.dtype != torch.float32:
        error = relative_error(_paged(model, spec, tokens, choices, model.dtype), logits)
    return Yardstick(tokens, logits, choices, error, model.dtype)


def _eager(model: Any, tokens: Sequence[int]) -> torch.Tensor:
    device = model.get_input_embeddings().weight.device
    model.set_attn_implementation("eager")
    try:
        positions = torch.arange(LENGTH, device=device)[None]
        ids = torch.tensor([list(tokens)], device=device)
        logits: torch.Tensor = model(ids, position_ids=positions, use_cache=False).logits[0]
    finally:
        model.set_attn_implementation(ATTENTION_NAME)
    return logits.float()


def _paged(
    model: Any, spec: ModelSpec, tokens: Sequence[int], choices: Sequence[ExpertChoice], dtype: torch.dtype
) -> torch.Tensor:
    """The same through the reference attention, in chunks that are rows of one step, beside another sequence."""
    device = model.device
    blocks = LENGTH // BLOCK_SIZE
    kv_cache = KVCache(
        num_layers=spec.num_layers,
        num_blocks=2 * blocks,
        num_kv_heads=spec.num_kv_heads,
        block_size=BLOCK_SIZE,
        head_dim=spec.head_dim,
        dtype=dtype,
        device=device,
    )
    rows, start = [], 0
    rows.append(Row(0, tokens[::-1], list(range(blocks, 2 * blocks)), range(0), turned_for=LENGTH))
    for count in CHUNKS:  # every layer writes the keys of all rows before any row is attended to
        own = tokens[start : start + count]
        rows.append(Row(start, own, list(range(blocks)), range(count), turned_for=LENGTH))
        start += count
    forward = TransformersForward(model, kv_cache, reference, longest=LENGTH)
    with followed_choices(choices, range(LENGTH), dtype):
        by_length = Family.of(model.config).length_rule is not None
        return forward(build_batch(rows, BLOCK_SIZE, device, by_length=by_length)).float()


@torch.inference_mode()
def self_check(yardstick: Yardstick, runner: Runner, block_size: int, rounded_by: Sequence[str] = ()) -> str:
    """Run the same sequence in chunks as it will be served, and say how far that is off; `rounded_by` are the options
    that round more than the model's dtype. Raises RuntimeError when it is more than rounding."""
    expected = yardstick.logits
    tokens, blocks, start = yardstick.tokens, list(range(-(-LENGTH // block_size))), 0
    found = []
    for count in CHUNKS:
        row = Row(start, tokens[start : start + count], blocks, range(count), turned_for=LENGTH)
        with followed_choices(yardstick.choices, range(start, start + count), yardstick.dtype):
            found.append(runner.forward([row]).float().clone())
        start += count
    served = torch.cat(found)
    error = relative_error(served, expected)
    if rounded_by:
        divergence = _divergence(expected, served)
        if not divergence <= MAX_DIVERGENCE:
            raise RuntimeError(
                f"{' and '.join(rounded_by)} changes what this model says: {divergence:.2g} nats off float32 (at most "
                f"{MAX_DIVERGENCE:g} allowed); try without"
            )
        return f"{divergence:.2g} nats and {error:.1%} off float32 with {' and '.join(rounded_by)}"
    allowed = allowed_error(yardstick.rounding, yardstick.dtype)
    if not error <= allowed:
        raise RuntimeError(
            f"its logits as they would be served are {error:.1%} off transformers' own in float32 (at most "
            f"{allowed:.1%} allowed)"
        )
    return f"{error:.2g} off transformers' own attention in float32 (at most {allowed:.2g})"


def _divergence(expected: torch.Tensor, served: torch.Tensor) -> float:
    """KL(expected || served) in nats, the mean over positions."""
    wanted, got = expected.log_softmax(-1), served.log_softmax(-1)
    return float((wanted.exp() * (wanted - got)).sum(-1).mean())
