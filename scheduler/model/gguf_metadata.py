"""What a GGUF file says about its model beside its tensors, held against the config that transformers makes of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softbatch.scheduler.model.gguf_tokenizer import refuse_unknown_cut
from softbatch.scheduler.model.model_error import ModelError
from softbatch.scheduler.model.model_files import first_line

if TYPE_CHECKING:  # most servers read no such file
    import numpy as np

# How the numbers of an architecture are called in configs; of several names the first that the config has.
_FIELDS: dict[str, tuple[str, ...]] = {
    "context_length": ("max_position_embeddings", "n_positions", "n_ctx"),
    "embedding_length": ("hidden_size",),
    "block_count": ("num_hidden_layers",),
    "feed_forward_length": ("intermediate_size", "n_inner", "ffn_hidden_size"),
    "attention.head_count": ("num_attention_heads",),
    "attention.head_count_kv": ("num_key_value_heads", "num_attention_heads"),
    "attention.key_length": ("head_dim", "global_head_dim"),
    "attention.value_length": ("head_dim", "global_head_dim"),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps", "norm_eps", "layer_norm_epsilon"),
    "attention.layer_norm_epsilon": ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps"),
    "attention.sliding_window": ("sliding_window",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "attention.scale": ("attention_multiplier",),
    "embedding_scale": ("embedding_multiplier",),
    "residual_scale": ("residual_multiplier",),
    "logit_scale": ("logits_scaling", "logit_scale"),
    "expert_count": ("num_experts", "num_local_experts"),
    "expert_used_count": ("num_experts_per_tok",),
    "expert_feed_forward_length": ("moe_intermediate_size", "intermediate_size"),
    "expert_shared_feed_forward_length": ("shared_expert_intermediate_size",),
    "vocab_size": ("vocab_size",),
}
# What transformers leaves at the default of its class, though nothing else of the config depends on it.
_TAKEN = {
    "context_length": "n_positions",
    "feed_forward_length": "n_inner",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}
_SCALED = {"linear": ("factor",), "yarn": ("factor", "original_context_length")}
# The one schedule of frequencies that files keep as a tensor, and the constants its makers use.
_FREQUENCIES = "rope_freqs.weight"
_LOW_FACTOR, _HIGH_FACTOR, _ORIGINAL = 1.0, 4.0, 8192
# What divides frequencies in short sequences and in long ones, by the names of configs; and what is said beside it.
_FACTORS = {"short_factor": "rope_factors_short.weight", "long_factor": "rope_factors_long.weight"}
_BESIDE_FACTORS = {"type", "original_context_length", "attn_factor", "finetuned"}
# Tensors that become part of the config.
IN_CONFIG = frozenset({_FREQUENCIES, *_FACTORS.values()})


class GgufFile:
    """The metadata and the tensor list of a file that was found to be whole."""

    def __init__(self, path: Path) -> None:
        """Raises ModelError for what is no whole GGUF file."""
        from gguf import GGUFReader

        try:
            self._reader = GGUFReader(str(path))
            # Not the tokenizer's, which are hundreds of thousands of strings.
            names = [name for name in self._reader.fields if not name.startswith("tokenizer.")]
            self.fields: dict[str, Any] = {name: self._reader.fields[name].contents() for name in names}
        except Exception as error:  # of many kinds: numpy's, its own
            raise ModelError(f"not a whole GGUF file: {first_line(error)}") from error
        size = path.stat().st_size
        for tensor in self._reader.tensors:
            if tensor.data_offset + tensor.n_bytes > size:
                raise ModelError(f"the file ends at {size} bytes, before its tensor {tensor.name} does: fetch it again")
        if not self._reader.tensors:
            raise ModelError("the file has no tensors")
        parts = int(self.fields.get("split.count", 1))
        if parts > 1:
            raise ModelError(
                f"the file is one of {parts} (split.count): join them first, with llama-gguf-split --merge"
            )
        self.architecture = str(self.fields.get("general.architecture", ""))

    @property
    def tensor_names(self) -> list[str]:
        return [tensor.name for tensor in self._reader.tensors]

    def tensor(self, name: str) -> np.ndarray[Any, Any] | None:
        """Of float32, as it lies in the file."""
        import numpy as np

        found = next((tensor for tensor in self._reader.tensors if tensor.name == name), None)
        return None if found is None else np.array(found.data, dtype=np.float32).reshape(-1)

    def of_tokenizer(self, name: str) -> Any:
        """None where nothing is said."""
        field = self._reader.fields.get(f"tokenizer.ggml.{name}")
        return None if field is None else field.contents()

    def of_model(self) -> dict[str, Any]:
        """What is said about the architecture, without its name in front."""
        prefix = f"{self.architecture}."
        return {name.removeprefix(prefix): value for name, value in self.fields.items() if name.startswith(prefix)}


def complete_config(config: Any, file: GgufFile) -> None:
    """Put into the config what transformers leaves out of it. Raises ModelError for what then still differs: a number
    that is dropped in silence makes another model."""
    refuse_unknown_cut(file.of_tokenizer)
    said = file.of_model()
    _scale_positions(config, file, said)
    for name, field in _TAKEN.items():
        if name in said and hasattr(config, field):
            setattr(config, field, said[name])
    has_window = _takes_window(config, said)
    for name, value in said.items():
        if not name.startswith("rope.") and (has_window or name != "attention.sliding_window"):
            _compare(config, f"{file.architecture}.{name}", _FIELDS.get(name, ()), value)
    _compare_rotary(config, file.architecture, said)


def _takes_window(config: Any, said: Mapping[str, Any]) -> bool:
    """Whether there is a window to compare; 0 is none. Where every layer has the same one, the file's is taken."""
    window = said.get("attention.sliding_window")
    is_uniform = not (getattr(config, "layer_types", None) or hasattr(config, "use_sliding_window"))
    if window is not None and is_uniform and hasattr(config, "sliding_window"):
        config.sliding_window = window or None
    return bool(window) or getattr(config, "sliding_window", None) is not None


def _compare(config: Any, name: str, fields: tuple[str, ...], value: Any) -> None:
    known = [field for field in fields if getattr(config, field, None) is not None]
    if not known:
        raise ModelError(
            f"the file says {name} = {value!r}, which transformers' {type(config).__name__} has no place for"
        )
    has = getattr(config, known[0])
    if not _same(has, value):
        raise ModelError(f"the file says {name} = {value!r}, but transformers makes {known[0]} = {has!r} of it")


def _same(has: Any, value: Any) -> bool:
    if isinstance(value, list):
        each_has = has if isinstance(has, list | tuple) else [has] * len(value)
        return len(each_has) == len(value) and all(map(_same, each_has, value))
    if not isinstance(has, int | float) or not isinstance(value, int | float):
        return bool(has == value)
    return math.isclose(float(has), float(value), rel_tol=1e-6, abs_tol=1e-12)


def _scale_positions(config: Any, file: GgufFile, said: Mapping[str, Any]) -> None:
    """rope.scaling, frequencies kept as a tensor, and how many dimensions of a head turn."""
    scaling = {
        name.removeprefix("rope.scaling."): value for name, value in said.items() if name.startswith("rope.scal")
    }
    _turn_a_part(config, said.get("rope.dimension_count"))
    if any(name in file.tensor_names for name in _FACTORS.values()):
        config.rope_parameters = _with_factors(config, file, scaling)
        return
    kind = str(scaling.pop("type", "linear" if scaling else "none"))
    scaling.pop("finetuned", None)
    if "rope.scale_linear" in said:  # the older name
        kind, scaling = "linear", {"factor": said["rope.scale_linear"]}
    if kind in ("none", "linear"):  # they do not depend on it, and some converters always write it
        scaling.pop("original_context_length", None)
    if kind == "linear" and not scaling:
        kind = "none"
    factors = file.tensor(_FREQUENCIES)
    if kind == "none" and factors is None:
        return
    parameters = dict(getattr(config, "rope_parameters", None) or {})
    if factors is not None:
        config.rope_parameters = parameters | _from_frequencies(factors, config, parameters)
        return
    unknown = scaling.keys() - set(_SCALED.get(kind, ()))
    if kind not in _SCALED or unknown or any(isinstance(value, dict) for value in parameters.values()):
        named = f"rope.scaling.{min(unknown)}" if kind in _SCALED and unknown else f"rope.scaling.type = {kind!r}"
        raise ModelError(f"its positions are scaled by {file.architecture}.{named}, which is not supported")
    missing = [name for name in _SCALED[kind] if not _is_positive(scaling.get(name))]
    if missing:
        named = f"{file.architecture}.rope.scaling"
        raise ModelError(
            f"the file says {named}.type = {kind!r} and {named}.{missing[0]} = {scaling.get(missing[0])!r}, which must "
            "be a number above 0"
        )
    scaled = {"rope_type": kind, "factor": float(scaling["factor"])}
    if kind == "yarn":
        scaled["original_max_position_embeddings"] = int(scaling["original_context_length"])
    config.rope_parameters = parameters | scaled


def _turn_a_part(config: Any, dimensions: Any) -> None:
    """Of each head, where the config can say that; transformers leaves it at the whole."""
    parameters = getattr(config, "rope_parameters", None) or {}
    is_said = "partial_rotary_factor" in parameters and not hasattr(config, "partial_rotary_factor")
    if is_said and isinstance(dimensions, int) and dimensions > 0:
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        config.rope_parameters = {**parameters, "partial_rotary_factor": dimensions / head_dim}


def _with_factors(config: Any, file: GgufFile, scaling: Mapping[str, Any]) -> dict[str, Any]:
    """longrope's scaling. Raises ModelError for what does not belong to it."""
    named, parameters = f"{file.architecture}.rope.scaling", dict(getattr(config, "rope_parameters", None) or {})
    unknown = scaling.keys() - _BESIDE_FACTORS
    if scaling.get("type", "longrope") != "longrope":
        unknown = {"type"}
    if unknown or any(isinstance(value, dict) for value in parameters.values()):
        other = f" and {named}.{min(unknown)} = {scaling[min(unknown)]!r}" if unknown else ""
        raise ModelError(f"its positions are scaled by {min(_FACTORS.values())} (longrope){other}: not supported")
    original = scaling.get("original_context_length")
    if not isinstance(original, int) or not _is_positive(original):
        message = f"the file has {min(_FACTORS.values())} (longrope) and says {named}.original_context_length"
        raise ModelError(f"{message} = {original!r}, which must be a whole number above 0")
    parameters |= {"rope_type": "longrope", "original_max_position_embeddings": original}
    if hasattr(config, "original_max_position_embeddings"):
        config.original_max_position_embeddings = original
    if "attn_factor" in scaling:
        parameters["attention_factor"] = scaling["attn_factor"]
    for field, name in _FACTORS.items():
        factors = file.tensor(name)
        if factors is None:
            raise ModelError(f"its positions are scaled by longrope, but it has no tensor {name}")
        parameters[field] = factors.tolist()
    return parameters


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def _from_frequencies(factors: np.ndarray[Any, Any], config: Any, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """llama3's scaling, of which files keep only by what it divides each frequency. Raises ModelError for any other."""
    import numpy as np

    factor = float(factors.max())
    size = 2 * len(factors)
    frequencies = float(parameters["rope_theta"]) ** -(np.arange(0, size, 2) / size)
    for original in dict.fromkeys((_ORIGINAL, round(config.max_position_embeddings / factor))):
        turns = original * frequencies / (2 * math.pi)
        smooth = np.clip((turns - _LOW_FACTOR) / (_HIGH_FACTOR - _LOW_FACTOR), 0, 1)
        if np.allclose(1 / ((1 - smooth) / factor + smooth), factors, rtol=1e-4):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": _LOW_FACTOR,
                "high_freq_factor": _HIGH_FACTOR,
                "original_max_position_embeddings": original,
            }
    raise ModelError(f"its frequencies are scaled by {_FREQUENCIES}, by no scheme that is known: not supported")


def _compare_rotary(config: Any, architecture: str, said: Mapping[str, Any]) -> None:
    parameters = getattr(config, "rope_parameters", None) or {}
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for name in (name for name in said if name.startswith("rope.") and not name.startswith("rope.scal")):
        value, full = said[name], parameters.get("full_attention", parameters)
        if name == "rope.freq_base":
            has: Any = full.get("rope_theta")
        elif name in ("rope.freq_base_swa", "rope.local.freq_base"):
            has = parameters.get("sliding_attention", {}).get("rope_theta")
        elif name == "rope.dimension_count":
            has = int(head_dim * full.get("partial_rotary_factor", 1.0))
        else:
            raise ModelError(f"the file says {architecture}.{name} = {value!r}, which is not supported")
        if has is None or not _same(has, value):
            raise ModelError(f"the file says {architecture}.{name} = {value!r}, but transformers makes {has!r} of it")
