"""What a config says about lengths, windows and positions: served as transformers computes it, or refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, LlamaConfig

from softbatch.scheduler.length_rule import LengthRule
from softbatch.scheduler.model import transformers_attention as interface
from softbatch.scheduler.model.batch import Row
from softbatch.scheduler.model.family import Family
from softbatch.scheduler.model.llama.decoder import DecoderForward
from softbatch.scheduler.model.loader import Loaded, load
from softbatch.scheduler.model.self_check import short_windows
from softbatch.scheduler.model.source import EMBEDDED_ALIAS, ModelError, resolve
from softbatch.scheduler.model.transformers_attention import ATTENTION_NAME, paged_attention
from softbatch.scheduler.protocol import EngineConfig
from tests.support.families import FAMILIES, SIZES, edit_weights, longrope, save_family

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256, "rope_theta": 1e4}
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
LONGROPE = longrope(4, 64)


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
        rows.append(Row(0, tokens, blocks, range(len(tokens) - 1, len(tokens)), turned_for=len(tokens)))
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


def test_a_factor_that_transformers_drops_is_refused() -> None:
    """It knows the older name of `rope_type` in most families, but not in this one."""

    def factors(kind: str, name: str) -> set[float]:
        config = AutoConfig.for_model(kind, rope_scaling={name: "linear", "factor": 8.0})
        return {one.factor for one in Family.of(config).rotary}

    assert factors("gemma3_text", "rope_type") == {1, 8}
    assert factors("llama", "type") == {8}
    with pytest.raises(ModelError, match=r"rope_parameters\.factor is 8\.0, but rope_type 'default'"):
        factors("gemma3_text", "type")


@pytest.mark.parametrize("kind", ["llama", "phi3"])
def test_longrope_is_served_on_both_sides_of_its_original_length(kind: str, tokenizer: str, tmp_path: Path) -> None:
    fields = {"original_max_position_embeddings": 64} if kind == "phi3" else {}  # it has a field of its own
    path = save_family(tmp_path / kind, tokenizer, kind, rope_parameters=LONGROPE, **fields)
    loaded = start(path)
    assert (loaded.info.max_model_len, loaded.length_rule) == (256, LengthRule(64, renews=kind == "phi3"))
    for length in (64, 65, 200):
        check_equal(loaded, path, length)
    with pytest.raises(ModelError, match="--max-model-len 257 is more than the model's own 256"):
        start(path, 257)


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("long_factor", [4.0] * 3, "3 entries"),
        ("short_factor", [1.0, 1.0, 0.0, 1.0], r"\[1.0, 1.0, 0.0, 1.0\]"),
        ("long_factor", None, "None"),
    ],
)
def test_wrong_factors_are_refused_by_name(field: str, value: Any, told: str) -> None:
    text = LlamaConfig(**SIZES, rope_parameters=LONGROPE)
    text.rope_parameters = LONGROPE | {field: value}
    with pytest.raises(ModelError, match=rf"rope_parameters.{field} is .?{told}.?, but must be 4 numbers above 0"):
        Family.of(text)


WINDOWS: list[tuple[str, dict[str, Any]]] = [
    ("mistral", {"sliding_window": 64}),
    ("phi3", {"sliding_window": 64}),
    ("qwen2", {"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 1}),
    ("gemma3_text", {"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]}),
]


@pytest.mark.parametrize(("kind", "fields"), WINDOWS, ids=[kind for kind, _ in WINDOWS])
def test_windows_that_some_sequences_reach(kind: str, fields: dict[str, Any], tokenizer: str, tmp_path: Path) -> None:
    """Whether a window ends within the longest sequence, at its end or behind it."""
    path = save_family(tmp_path / kind, tokenizer, kind, **fields)
    for asked in (200, 65, 64, 20):
        check_equal(start(path, asked), path, asked)


def test_a_window_is_met_by_the_self_check(tokenizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A window is longer than what the check runs, and yet must not get lost."""
    path = save_family(tmp_path / "model", tokenizer, "mistral", sliding_window=64)
    monkeypatch.setattr(DecoderForward, "limit_windows", lambda *_: None)
    with pytest.raises(ModelError, match=r"off transformers' own in float32"):
        start(path, 128)
    monkeypatch.undo()
    lost = lambda *given, **options: paged_attention(*given, **options | {"sliding_window": None})  # noqa: E731
    monkeypatch.setitem(AttentionInterface._global_mapping, ATTENTION_NAME, lost)
    monkeypatch.setattr(interface, "register", lambda: None)
    with pytest.raises(ModelError, match=r"through paged attention are .* off transformers' own in float32"):
        start(path, 128)


def test_a_layer_that_asks_for_another_window_than_its_config_is_refused(tokenizer: str, tmp_path: Path) -> None:
    path = save_family(tmp_path / "model", tokenizer, "qwen3", sliding_window=64, use_sliding_window=True)
    model = AutoModelForCausalLM.from_pretrained(path)
    model.config.layer_types = ["sliding_attention"] * 2
    for layer in model.model.layers:
        layer.self_attn.sliding_window = 64
    with short_windows(model, 128) as window:
        assert window == model.config.sliding_window == model.model.layers[1].self_attn.sliding_window == 10
    assert model.config.sliding_window == model.model.layers[1].self_attn.sliding_window == 64
    with short_windows(model, 64) as window:
        assert (window, model.config.sliding_window) == (None, 64)
    model.model.layers[1].self_attn.sliding_window = 32
    with pytest.raises(RuntimeError, match=r"layer 1 sees 32 tokens, but by config.json 64"), short_windows(model, 128):
        pass


def test_chunks_that_sequences_leave_are_refused() -> None:
    """A token of Llama 4 sees nothing of the chunk before its own."""
    kinds = ["chunked_attention", "full_attention"]
    config = LlamaConfig(num_hidden_layers=2, layer_types=kinds, attention_chunk_size=64, max_position_embeddings=256)
    Family.of(config).refuse_unsupported("Llama4ForCausalLM", 64)
    with pytest.raises(ModelError, match=r"its own chunk of 64 tokens .*--max-model-len 64 serves it"):
        Family.of(config).refuse_unsupported("Llama4ForCausalLM", 65)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_attention_of_another_kind_is_refused_in_every_dtype(dtype: str, tokenizer: str, tmp_path: Path) -> None:
    """Nothing in this config says that tokens see those behind them, but the flag of one family."""
    path = save_family(tmp_path / "both-ways", tokenizer, "gemma3_text", use_bidirectional_attention=True)
    with pytest.raises(ModelError, match="this architecture cannot be served"):
        start(path, 128, dtype)


def test_a_mask_of_the_models_own_is_refused(tokenizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Doge adds to the scores what it makes of the values; its config says nothing of that."""
    monkeypatch.setitem(FAMILIES, "doge", SIZES)
    path = save_family(tmp_path / "own-mask", tokenizer, "doge")
    edit_weights(
        path, lambda weights: {k: torch.full_like(w, 0.7) if k.endswith(".A") else w for k, w in weights.items()}
    )
    with pytest.raises(ModelError, match=r"this architecture cannot be served: .* off transformers' own in float32"):
        start(path, 128, "bfloat16")
