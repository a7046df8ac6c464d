"""The identity of a model as far as soft prompts care."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# The config fields that shape what the network computes; a field a model lacks is left out.
_ARCHITECTURE = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "hidden_activation",
    "activation_function",
    "rms_norm_eps",
    "layer_norm_eps",
    "layer_norm_epsilon",
    "rope_parameters",
    "sliding_window",
    "attn_logit_softcapping",
    "final_logit_softcapping",
)
# Its token ids change when the normaliser, the pre-tokeniser or the merges do.
_PROBE_TEXT = "Hello, world!  It's 1234567890 — naïve\n\n\tdef f(x):\r\n        return x+1  日本語 🙂 ﬁ <b>"
_SAMPLES_PER_PARAMETER = 64


def fingerprint(model: Any, tokenizer: Any) -> str:
    """Hex SHA-256 that tells two models apart whose soft prompts cannot be exchanged.

    Covers the architecture, a sample of every weight, vocabulary, tokenisation and chat template of a
    transformers model and tokenizer. The same checkpoint has the same fingerprint loaded in float32 or
    bfloat16, under any name and any attention implementation. Take it before weights are repacked.
    """
    import torch

    digest = hashlib.sha256()

    def feed(part: bytes) -> None:
        digest.update(len(part).to_bytes(8, "little") + part)

    config = model.config.get_text_config()
    fields = {name: _canonical(getattr(config, name, None)) for name in _ARCHITECTURE}
    feed(json.dumps({name: value for name, value in fields.items() if value is not None}, sort_keys=True).encode())
    for name, shape, numbers in sorted(_weights(model), key=lambda item: item[0]):
        count = min(_SAMPLES_PER_PARAMETER, math.prod(shape))
        index = torch.arange(count) * math.prod(shape) // max(count, 1)
        sample = numbers(index).float().bfloat16().cpu().view(torch.int16)
        feed(json.dumps([name, list(shape)]).encode())
        feed(sample.numpy().astype("<i2").tobytes())
    feed(json.dumps(sorted(tokenizer.get_vocab().items())).encode())
    feed(json.dumps(list(tokenizer.encode(_PROBE_TEXT, add_special_tokens=False))).encode())
    special = [tokenizer.bos_token, tokenizer.eos_token, tokenizer.chat_template]
    feed(json.dumps(special, sort_keys=True).encode())
    return digest.hexdigest()


def _weights(model: Any) -> Iterator[tuple[str, tuple[int, ...], Callable[[torch.Tensor], torch.Tensor]]]:
    """Each weight's name, shape, and numbers at places of it when it is flat; a tied weight once. Where a module keeps
    some in blocks, they are what they are when widened, so that both ways to load a checkpoint are one model."""
    parts: set[str] = set()
    for prefix, module in model.named_modules():
        for name, names, shape, numbers in module.weights_in_blocks() if hasattr(module, "weights_in_blocks") else ():
            parts |= {f"{prefix}.{part}" for part in names}
            yield f"{prefix}.{name}", tuple(shape), numbers
    for name, parameter in model.named_parameters():
        if name not in parts:
            yield name, tuple(parameter.shape), partial(_numbers_at, parameter.detach().reshape(-1))


def _numbers_at(flat: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    return flat[places.to(flat.device)]


def _canonical(value: Any) -> Any:
    """Numbers in one spelling, so that 10000 and 10000.0, or 1e-5 and its float32 rounding, are the same."""
    if isinstance(value, dict):
        return {str(key): _canonical(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_canonical(item) for item in value]
    if isinstance(value, float):
        return int(value) if value.is_integer() else f"{value:.6g}"
    return value
