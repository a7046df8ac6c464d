"""What a config says about lengths, windows and positions: served as transformers computes it, or refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from softbatch.scheduler.model.batch import Row
from softbatch.scheduler.model.loader import Loaded, load
from softbatch.scheduler.model.source import EMBEDDED_ALIAS, ModelError, resolve
from softbatch.scheduler.protocol import EngineConfig
from tests.support.families import save_family

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256, "rope_theta": 1e4}
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
    "original_max_position_embeddings": 64,
    "rope_theta": 1e4,
}


@pytest.fixture(scope="module")
def tokenizer() -> str:
    return resolve(EMBEDDED_ALIAS).path


def start(path: Path, asked: int | None = None, dtype: str = "float32") -> Loaded:
    config = EngineConfig(model=str(path), dtype=dtype, device="cpu", kv_cache_gib=0.01, max_model_len=asked)
    return load(config, lambda *_: None)


def check_equal(loaded: Loaded, path: Path, length: int) -> None:
    """Two sequences of up to `length` tokens in one step give the logits that transformers gives to each alone."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    sequences = [[(7 * i + 3) % 512 for i in range(length)], [(5 * i + 1) % 512 for i in range(9)]]
    size = loaded.kv_cache.block_size
    rows, first = [], 0
    for tokens in sequences:
        blocks = list(range(first, first + -(-len(tokens) // size)))
        rows.append(Row(0, tokens, blocks, range(len(tokens) - 1, len(tokens))))
        first += len(blocks)
    with torch.inference_mode():
        found = loaded.runner.forward(rows)
        expected = torch.cat([model(torch.tensor([tokens])).logits[:, -1] for tokens in sequences])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


LENGTHS: list[tuple[str, dict[str, Any], int, int]] = [
    ("qwen2", YARN, 1024, 1024),
    ("llama", YARN, 1024, 1024),
    ("llama", LINEAR, 256, 1024),
    ("llama", DYNAMIC, 256, 256),
]


@pytest.mark.parametrize(("kind", "rope", "default", "most"), LENGTHS, ids=lambda value: str(value)[:30])
def test_stretched_positions(
    kind: str, rope: dict[str, Any], default: int, most: int, tokenizer: str, tmp_path: Path
) -> None:
    path = save_family(tmp_path / kind, tokenizer, kind, rope_parameters=rope)
    assert start(path).info.max_model_len == default
    loaded = start(path, most)
    assert loaded.info.max_model_len == most
    check_equal(loaded, path, most - 3)
    with pytest.raises(ModelError, match=f"--max-model-len {most + 1} is more than the model's own {most}"):
        start(path, most + 1)


@pytest.mark.parametrize("kind", ["llama", "phi3"])
def test_longrope_is_served_as_far_as_its_short_factors_reach(kind: str, tokenizer: str, tmp_path: Path) -> None:
    fields = {"original_max_position_embeddings": 64} if kind == "phi3" else {}  # it has a field of its own
    path = save_family(tmp_path / kind, tokenizer, kind, rope_parameters=LONGROPE, **fields)
    for asked in (None, 65):
        with pytest.raises(ModelError, match=r"longrope.*: --max-model-len 64 serves it"):
            start(path, asked)
    check_equal(start(path, 64), path, 64)


WINDOWS: list[tuple[str, dict[str, Any]]] = [
    ("mistral", {"sliding_window": 64}),
    ("phi3", {"sliding_window": 64}),
    ("qwen2", {"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 1}),
    ("gemma3_text", {"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]}),
]


@pytest.mark.parametrize(("kind", "fields"), WINDOWS, ids=[kind for kind, _ in WINDOWS])
def test_a_window_that_no_sequence_reaches_hides_nothing(
    kind: str, fields: dict[str, Any], tokenizer: str, tmp_path: Path
) -> None:
    path = save_family(tmp_path / kind, tokenizer, kind, **fields)
    for asked in (None, 65):
        with pytest.raises(
            ModelError, match=r"no further back than 64 tokens in \d of its 2 .*--max-model-len 64"
        ) as no:
            start(path, asked)
        assert "full_attention" not in str(no.value)
    check_equal(start(path, 64), path, 64)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_attention_of_another_kind_is_refused_in_every_dtype(dtype: str, tokenizer: str, tmp_path: Path) -> None:
    """Nothing in this config says that tokens see those behind them, but the flag of one family."""
    path = save_family(tmp_path / "both-ways", tokenizer, "gemma3_text", use_bidirectional_attention=True)
    with pytest.raises(ModelError, match="this architecture cannot be served"):
        start(path, 128, dtype)
