"""How the layers of a model differ: how far back each sees, and how it turns positions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

# Of every window, while a dozen tokens are to meet it.
NARROW = 5


def windows_of(config: Any) -> tuple[int | None, ...]:
    """How many tokens each sees in each layer, itself among them; None where all, or more than any sequence has.

    Raises ValueError for attention of another kind.
    """
    layers = config.num_hidden_layers
    kinds = list(getattr(config, "layer_types", None) or [])
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    longest = getattr(config, "max_position_embeddings", None)
    if window is not None and longest is not None and window >= longest:
        window = None
    if not set(kinds) <= {"full_attention", "sliding_attention"}:
        found = ", ".join(sorted(set(kinds)))
        raise ValueError(
            f"the model's attention is neither full nor full within a window in every layer (layer_types has {found})"
        )
    if getattr(config, "attn_logit_softcapping", None):
        raise ValueError(
            "the model caps its attention scores (attn_logit_softcapping): compression does not support it"
        )
    # No config says so. A family that is not named here is found out by comparing logits, with its weights in memory.
    if getattr(config, "model_type", "") == "gpt_oss":
        raise ValueError("the model's attention has sinks: compression does not support them")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds) or (window,) * layers


def rotary_kinds_of(body: Any, config: Any) -> tuple[str | None, ...]:
    """What the rotary module calls each layer's positions, "" where it has one kind; None where there are none."""
    layers: int = config.num_hidden_layers
    rotary = getattr(body, "rotary_emb", None)
    if rotary is None:
        return (None,) * layers
    kinds: list[str] = [""] * layers if hasattr(rotary, "inv_freq") else list(config.layer_types)
    attentions = [getattr(layer, "self_attn", None) for layer in getattr(body, "layers", [None] * layers)]
    turns = [bool(getattr(attention, "use_rope", True)) for attention in attentions]
    return tuple(kind if turn else None for kind, turn in zip(kinds, turns, strict=True))


def longest_of_one_kind(config: Any) -> int | None:
    """How long sequences are whose positions all turn in one way; None for a model that does not say.

    Beyond the original length of some scalings they turn otherwise, by the longest sequence of a batch.
    """
    longest: int | None = getattr(config, "max_position_embeddings", None)
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [each for each in parameters.values() if isinstance(each, Mapping)]
    for each in nested or [parameters]:
        original = each.get("original_max_position_embeddings")
        if each.get("rope_type") == "longrope" and original is not None:
            longest = min(longest or original, original)
    return longest


@contextmanager
def narrow_windows(config: Any, windows: tuple[int | None, ...]) -> Iterator[tuple[int | None, ...]]:
    """The windows as they are meanwhile, in the masks that transformers makes as well: NARROW tokens each."""
    if not any(windows):
        yield windows
        return
    window, config.sliding_window = config.sliding_window, NARROW
    try:
        yield tuple(each and NARROW for each in windows)
    finally:
        config.sliding_window = window
