"""What a config says about its model: sizes, how far each layer sees, how positions turn. Nothing else reads it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from softbatch.scheduler.length_rule import LengthRule
from softbatch.scheduler.model.model_error import ModelError

# Their frequencies are the same at every length, so sequences of one batch cannot disturb each other.
STATIC_ROTARY = frozenset({"default", "linear", "llama3", "yarn", "proportional"})
# Theirs are the one or the other, by the length of a sequence.
BY_LENGTH = frozenset({"longrope"})
# What transformers computes again where a sequence has become long.
_RENEWED = frozenset({"phi3", "phimoe"})
_DEFAULT_POSITIONS = 4096
_MOST = 1e30  # of the numbers that positions are turned by


@dataclass(frozen=True)
class Rotary:
    """One scheme of rotary positions: `original` is the length the model was first trained for."""

    kind: str
    factor: float = 1.0
    original: int | None = None


@dataclass(frozen=True)
class Family:
    """What the config of a decoder says. `windows` has for each layer how many tokens each token sees, itself among
    them, None where all; `chunk` is the length of chunks that some layers never see out of.

    `max_positions` is the longest sequence unless something else is asked for, `reach` the longest that may be asked
    for; both are None for a model that does not say.
    """

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int | None
    reach: int | None
    windows: tuple[int | None, ...]
    chunk: int | None
    rotary: tuple[Rotary, ...]
    softcap: float | None
    renews: bool = False  # what a sequence has computed, once it is long

    @classmethod
    def of(cls, config: Any) -> Family:
        """From a transformers config. Raises ModelError, which names the field."""
        text = config.get_text_config()
        hidden = _positive(text, "hidden_size")
        heads = _positive(text, "num_attention_heads")
        layers = _positive(text, "num_hidden_layers")
        kv_heads = _positive(text, "num_key_value_heads", heads)
        if heads % kv_heads:
            raise _wrong("num_key_value_heads", kv_heads, f"a divisor of num_attention_heads, which is {heads}")
        if _given(text, "head_dim") is None and hidden % heads:
            raise _wrong("hidden_size", hidden, f"a multiple of num_attention_heads, which is {heads}")
        rotary = _rotary(text)
        own = _positive(text, "max_position_embeddings", _positive(text, "n_positions", 0)) or None
        stretched = [int(one.factor * (one.original or own or 0)) for one in rotary if one.kind in ("yarn", "linear")]
        scaled = own and max(own, *stretched, 0)
        return cls(
            hidden_size=hidden,
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=_positive(text, "head_dim", hidden // heads),
            max_positions=scaled if any(one.kind == "yarn" for one in rotary) else own,
            reach=scaled,
            windows=_windows(text, layers),
            chunk=_positive(text, "attention_chunk_size") if "chunked_attention" in _kinds(text) else None,
            rotary=rotary,
            softcap=_given(text, "attn_logit_softcapping"),
            renews=_given(text, "model_type") in _RENEWED and hasattr(text, "original_max_position_embeddings"),
        )

    @property
    def default_length(self) -> int:
        """The longest sequence where nobody asks for another."""
        return self.max_positions or _DEFAULT_POSITIONS

    @property
    def length_rule(self) -> LengthRule | None:
        """None where positions turn in one way."""
        originals = self._originals()
        return LengthRule(min(originals), self.renews) if originals else None

    def _originals(self) -> set[int]:
        return {rotary.original or self.default_length for rotary in self.rotary if rotary.kind in BY_LENGTH}

    @property
    def of_one_kind(self) -> int | None:
        """How long sequences are whose positions all turn in one way; None for a model that does not say."""
        turning = [rotary.original for rotary in self.rotary if rotary.kind not in STATIC_ROTARY]
        return min((each for each in (self.max_positions, *turning) if each is not None), default=None)

    def length(self, asked: int | None) -> int:
        """The longest sequence that is to be served. Raises ModelError for one that the model is not made for."""
        if asked is None:
            return self.default_length
        if self.reach is not None and asked > self.reach:
            raise ModelError(f"--max-model-len {asked} is more than the model's own {self.reach}")
        return asked

    def windows_within(self, longest: int) -> tuple[int | None, ...]:
        """`windows`, but None too where no sequence of up to `longest` tokens reaches the end of one."""
        return tuple(None if window is None or window >= longest else window for window in self.windows)

    def refuse_unsupported(self, kind: str, longest: int) -> None:
        """Raises ModelError where sequences of up to `longest` tokens would come out wrong; `kind` is the class."""
        if self.chunk is not None and self.chunk < longest:
            raise ModelError(
                f"{kind} sees only its own chunk of {self.chunk} tokens in some layers (attention_chunk_size), which "
                "is not supported yet; within the first chunk every layer sees everything: "
                f"--max-model-len {self.chunk} serves it"
            )
        if len(self._originals()) > 1:
            raise ModelError(f"{kind} has several original lengths (rope_parameters), which is not supported yet")
        for rotary in self.rotary:
            if rotary.kind not in STATIC_ROTARY | BY_LENGTH and longest > (rotary.original or 0):
                advice = f": --max-model-len {rotary.original} serves it" if rotary.original else ""
                raise ModelError(
                    f"{kind} turns all positions otherwise in sequences longer than {rotary.original} tokens "
                    f"(rope_parameters, {rotary.kind}), which is not supported yet{advice}"
                )


def _given(text: Any, field: str) -> Any:
    return getattr(text, field, None)


def _wrong(field: str, value: Any, right: str) -> ModelError:
    return ModelError(f"config.json: {field} is {value!r}, but must be {right}")


def _positive(text: Any, field: str, default: int | None = None) -> int:
    """An integer of at least 1. Raises ModelError for anything else."""
    value = _given(text, field)
    if value is None:
        if default is None:
            raise ModelError(f"config.json: {field} is missing")
        return default
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise _wrong(field, value, "a whole number of at least 1")
    return value


def _windows(text: Any, layers: int) -> tuple[int | None, ...]:
    """Raises ModelError for attention of another kind than full, or full within a window or a chunk."""
    kinds = _kinds(text)
    if not kinds:
        uses = _given(text, "sliding_window") is not None and getattr(text, "use_sliding_window", True)
        return (_positive(text, "sliding_window") if uses else None,) * layers
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention", "chunked_attention"):
            raise ModelError(f"config.json: layer_types has {kind}, which is not supported yet")
    if len(kinds) != layers:
        raise _wrong("layer_types", f"{len(kinds)} entries", f"one for each of the {layers} layers")
    return tuple(_positive(text, "sliding_window") if kind == "sliding_attention" else None for kind in kinds)


def _kinds(text: Any) -> Sequence[str]:
    """Of each layer's attention; empty for a model that does not tell layers apart."""
    return _given(text, "layer_types") or ()


def _rotary(text: Any) -> tuple[Rotary, ...]:
    """One, or one for each kind of layer; none for a model with other positions."""
    parameters = _given(text, "rope_parameters")
    if not isinstance(parameters, Mapping) or not parameters:
        return ()
    nested = [each for each in parameters.values() if isinstance(each, Mapping)]
    return tuple(_one_rotary(text, each) for each in nested or [parameters])


def _one_rotary(text: Any, parameters: Mapping[str, Any]) -> Rotary:
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    for field in (
        "rope_theta",
        "factor",
        "partial_rotary_factor",
        "attention_factor",
        "original_max_position_embeddings",
    ):
        value = parameters.get(field)
        if value is not None and not _is_above_0(value):
            raise _wrong(f"rope_parameters.{field}", value, "a number above 0")
    factor = parameters.get("factor")
    if kind == "default" and factor not in (None, 1):
        message = "no scaled positions: rope_type says how, such as 'linear' or 'yarn', or leave the factor out"
        raise ModelError(f"config.json: rope_parameters.factor is {factor!r}, but rope_type {kind!r} knows {message}")
    if kind == "longrope":
        _check_factors(text, parameters)
    own = _given(text, "max_position_embeddings")
    original = own if kind == "dynamic" else parameters.get("original_max_position_embeddings") or own
    return Rotary(str(kind), float(parameters.get("factor") or 1.0), None if original is None else int(original))


def _check_factors(text: Any, parameters: Mapping[str, Any]) -> None:
    """Raises ModelError unless there is a factor for each frequency of short sequences, and of long ones."""
    head_dim = _positive(text, "head_dim", text.hidden_size // text.num_attention_heads)
    count = -(-int(head_dim * (parameters.get("partial_rotary_factor") or 1.0)) // 2)
    for field in ("short_factor", "long_factor"):
        factors = parameters.get(field)
        right = isinstance(factors, list) and len(factors) == count and all(map(_is_above_0, factors))
        if not right:
            shown = f"{len(factors)} entries" if isinstance(factors, list) and len(factors) != count else factors
            raise _wrong(f"rope_parameters.{field}", shown, f"{count} numbers above 0, one for each frequency")


def _is_above_0(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, int | float) and 0 < value < _MOST
