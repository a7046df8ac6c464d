"""How transformers reads a checkpoint in MXFP4: on a CPU its experts stay in blocks, elsewhere they are widened.

transformers itself widens all of them on a CPU, which takes three and a half times their memory.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from softbatch.scheduler.model.block_experts import BlockExperts
from softbatch.scheduler.model.model_error import ModelError
from softbatch.scheduler.model.mxfp4 import GROUP, is_in_blocks

_METHOD = "softbatch_blocks"


class BlocksConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """Says to transformers that a model's experts are in blocks."""

    def __init__(self, **fields: Any) -> None:
        self.quant_method = _METHOD


class BlocksQuantizer(HfQuantizer):  # type: ignore[misc]
    """Puts `BlockExperts` where their weights are to be read."""

    def _process_model_before_weight_loading(self, model: Any, **options: Any) -> None:
        for module in list(model.modules()):
            for name, child in list(module.named_children()):
                if type(child).__name__ == "GptOssExperts":
                    setattr(module, name, BlockExperts(child))

    def _process_model_after_weight_loading(self, model: Any, **options: Any) -> Any:
        self.remove_quantization_config(model)
        return model

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return False


if _METHOD not in AUTO_QUANTIZER_MAPPING:
    register_quantization_config(_METHOD)(BlocksConfig)
    register_quantizer(_METHOD)(BlocksQuantizer)


def read_in_blocks(config: Any, device: torch.device) -> None:
    """Has transformers read experts so where `config` says that they are in MXFP4. Raises ModelError for sizes that no
    blocks have."""
    if not is_in_blocks(config):
        return
    for field in ("hidden_size", "intermediate_size"):
        if getattr(config, field) % GROUP:
            raise ModelError(
                f"config.json: {field} is {getattr(config, field)}, but experts in MXFP4 (quantization_config) take a "
                f"multiple of {GROUP}"
            )
    if device.type == "cpu":
        config.quantization_config = {"quant_method": _METHOD}
    else:
        config.quantization_config = config.quantization_config | {"dequantize": True}
