"""Adapters as PEFT itself trains and saves them, for tiny models."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    CartridgeConfig,
    CPTConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from transformers import PreTrainedModel

from softbatch.prompt_store.peft import CONFIG_NAME, import_peft
from softbatch.prompt_store.soft_prompt_file import ModelSpec, SoftPromptError
from tests.support.soft_prompt_samples import FINGERPRINT, MAX_BYTES, tiny_llama

N = 7
CAUSAL = {"task_type": "CAUSAL_LM"}
CPT_TYPES = [1, 2, 2, 3, 4, 1, 2]
ADAPTERS: dict[str, Callable[[], Any]] = {
    "PROMPT_TUNING": lambda: PromptTuningConfig(**CAUSAL, num_virtual_tokens=N),
    "P_TUNING mlp": lambda: PromptEncoderConfig(**CAUSAL, num_virtual_tokens=N, encoder_hidden_size=24),
    "P_TUNING lstm": lambda: PromptEncoderConfig(
        **CAUSAL, num_virtual_tokens=N, encoder_hidden_size=24, encoder_reparameterization_type="LSTM"
    ),
    "CPT": lambda: CPTConfig(
        **CAUSAL,
        num_virtual_tokens=N,
        cpt_token_ids=list(range(N)),
        cpt_mask=[1] * N,
        cpt_tokens_type_mask=CPT_TYPES,
    ),
    "PREFIX_TUNING": lambda: PrefixTuningConfig(**CAUSAL, num_virtual_tokens=N),
    "PREFIX_TUNING projected": lambda: PrefixTuningConfig(
        **CAUSAL, num_virtual_tokens=N, prefix_projection=True, encoder_hidden_size=24
    ),
    "CARTRIDGE": lambda: CartridgeConfig(**CAUSAL, num_virtual_tokens=N, num_frozen_tokens=2),
}
MODELS: dict[str, dict[str, int]] = {
    "grouped-query": {},
    "multi-head": {"num_key_value_heads": 4},
    "wide heads": {"head_dim": 12},
}
TOKENS = torch.randint(0, 256, (1, 9), generator=torch.Generator().manual_seed(1))


def spec_of(model: PreTrainedModel) -> ModelSpec:
    config = model.config
    return ModelSpec(
        "tiny",
        FINGERPRINT,
        config.hidden_size,
        config.num_hidden_layers,
        config.num_key_value_heads,
        config.head_dim,
    )


def train(model: PreTrainedModel, name: str) -> PeftModel:
    """An adapter with every trainable number drawn at random, as after training."""
    torch.manual_seed(3)
    adapter = get_peft_model(model, ADAPTERS[name]())
    for parameter in adapter.prompt_encoder.parameters():
        parameter.data = torch.randn_like(parameter) * 0.5
    return adapter.eval()


def saved_adapter(tmp_path: Path, name: str = "PROMPT_TUNING", model: PreTrainedModel | None = None) -> Path:
    folder = tmp_path / "adapter"
    train(model or tiny_llama(), name).save_pretrained(folder)
    return folder


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / CONFIG_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def zipped(folder: Path, path: Path, inside: str = "", method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for file in sorted(folder.iterdir()):
            archive.write(file, inside + file.name)
    return path


def refused(
    source: Path | Sequence[Path], spec: ModelSpec | None = None, max_bytes: int = MAX_BYTES
) -> SoftPromptError:
    with pytest.raises(SoftPromptError) as caught:
        import_peft(source, spec or spec_of(tiny_llama()), max_bytes)
    return caught.value
