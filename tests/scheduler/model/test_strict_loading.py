"""A directory whose weights or files are not the model's is refused in a line that names what is wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from softbatch.scheduler.model.loader import load
from softbatch.scheduler.model.source import EMBEDDED_ALIAS, ModelError, resolve
from softbatch.scheduler.protocol import EngineConfig
from tests.support.families import FAMILIES, edit_weights, save_family

Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def tokenizer() -> str:
    return resolve(EMBEDDED_ALIAS).path


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, tokenizer: str) -> Path:
    return save_family(tmp_path_factory.mktemp("strict") / "llama", tokenizer)


@pytest.fixture
def directory(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


def edit_json(file: Path, **fields: Any) -> None:
    content = json.loads(file.read_text(encoding="utf-8-sig"))
    file.write_text(json.dumps(content | fields))


def start(path: Path, **options: Any) -> Any:
    return load(
        EngineConfig(model=str(path), device="cpu", kv_cache_gib=0.01, **({"dtype": "float32"} | options)), print
    )


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(ModelError) as refused:
        start(path, **options)
    message = str(refused.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(("kind", "dtype"), [(kind, dtype) for kind in FAMILIES for dtype in ("float32", "bfloat16")])
def test_every_family_starts(kind: str, dtype: str, tokenizer: str, tmp_path: Path) -> None:
    """None of their files lacks a weight that has to be there, ties a head that differs, or fails the self-check."""
    # Positions of ministral3 and gpt_oss reach further by yarn.
    assert start(save_family(tmp_path / kind, tokenizer, kind), dtype=dtype).info.max_model_len >= 256


def without(name: str) -> Callable[[Weights], Weights]:
    return lambda weights: {key: value for key, value in weights.items() if key != name}


def prefixed(prefix: str) -> Callable[[Weights], Weights]:
    return lambda weights: {f"{prefix}{key}": value for key, value in weights.items()}


def extra(name: str) -> Callable[[Weights], Weights]:
    return lambda weights: weights | {name: torch.zeros(32)}


WRONG_WEIGHTS: list[tuple[Callable[[Weights], Weights], tuple[str, ...]]] = [
    (prefixed("_orig_mod."), ("lacks lm_head.weight and", "begin with '_orig_mod.'", "torch.compile")),
    (prefixed("module."), ("lacks lm_head.weight and", "begin with 'module.'", "DataParallel")),
    (prefixed("policy.model."), ("lacks lm_head.weight and", "begin with 'policy.model.'")),
    (without("model.layers.1.mlp.up_proj.weight"), ("lacks model.layers.1.mlp.up_proj.weight",)),
    (without("model.norm.weight"), ("lacks model.norm.weight",)),
    (without("lm_head.weight"), ("lacks lm_head.weight", "tie_word_embeddings")),
    (extra("model.layers.0.self_attn.q_proj.bias"), ("has model.layers.0.self_attn.q_proj.bias", "has not")),
    (extra("model.layers.2.input_layernorm.weight"), ("has model.layers.2.input_layernorm.weight", "has not")),
    (
        lambda weights: without("lm_head.weight")(weights) | {"score.weight": torch.zeros(3, 32)},
        ("lacks lm_head.weight", "tie_word_embeddings"),
    ),
    (
        lambda weights: weights | {"model.embed_tokens.weight": torch.zeros(500, 32)},
        ("model.embed_tokens.weight is [500, 32] in the file and [512, 32] by config.json",),
    ),
]


@pytest.mark.parametrize(("change", "parts"), WRONG_WEIGHTS, ids=[parts[0] + parts[-1] for _, parts in WRONG_WEIGHTS])
def test_other_weights_than_the_config_names(
    change: Callable[[Weights], Weights], parts: tuple[str, ...], directory: Path
) -> None:
    edit_weights(directory, change)
    message = refusal(directory)
    for part in parts:
        assert part in message, message


def test_weights_that_a_file_may_have_or_lack(directory: Path, tokenizer: str, tmp_path: Path) -> None:
    """Frequencies in older files; a tied head; masks in GPT-2's; a head that is written although it is tied."""
    edit_weights(directory, extra("model.layers.0.self_attn.rotary_emb.inv_freq"))
    start(directory)
    gpt2 = save_family(tmp_path / "gpt2", tokenizer, "gpt2")
    edit_weights(gpt2, lambda weights: weights | {"transformer.h.0.attn.bias": torch.ones(1, 1, 256, 256)})
    start(gpt2)
    tied = save_family(tmp_path / "tied", tokenizer, tie_word_embeddings=True)
    start(tied)
    edit_weights(tied, lambda weights: weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()})
    start(tied)
    edit_weights(tied, lambda weights: weights | {"lm_head.weight": torch.zeros(512, 32)})
    assert "tie_word_embeddings" in refusal(tied)
    edit_weights(tied, lambda weights: without("lm_head.weight")(weights) | {"score.weight": torch.zeros(3, 32)})
    assert "has score.weight" in refusal(tied)


WRONG_CONFIGS: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"num_hidden_layers": 1}, ("has model.layers.1.",)),
    ({"num_hidden_layers": 3}, ("lacks model.layers.2.", "num_hidden_layers")),
    ({"num_hidden_layers": "2"}, ("config.json: num_hidden_layers", "'2'")),
    ({"num_hidden_layers": True}, ("config.json: num_hidden_layers",)),
    ({"intermediate_size": 64.0}, ("config.json: intermediate_size", "64.0")),
    ({"head_dim": "8"}, ("config.json: head_dim", "'8'")),
    ({"num_key_value_heads": 3}, ("config.json: num_key_value_heads", "num_attention_heads")),
    ({"num_attention_heads": 0}, ("config.json: num_attention_heads",)),
    ({"rms_norm_eps": "1e-6"}, ("config.json: rms_norm_eps", "1e-6")),
    ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": "4"}}, ("factor", "'4'")),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": "10000"}}, ("rope_theta", "'10000'")),
    ({"vocab_size": 500}, ("[512, 32] in the file and [500, 32] by config.json",)),
    ({"model_type": ["llama"]}, ("config.json: model_type is ['llama']",)),
    ({"model_type": "lama"}, ("config.json: model_type is 'lama'",)),
    ({"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}, ("config.json", "auto_map", "never run")),
    ({"model_type": "bert"}, ("lacks bert.", "has lm_head.weight")),
    ({"model_type": "t5"}, ("model_type 't5' is no causal language model",)),
    ({"layer_types": ["full_attention", "linear_attention"]}, ("layer_types", "linear_attention")),
    ({"layer_types": ["full_attention"]}, ("layer_types", "num_hidden_layers")),
    ({"hidden_act": "banana"}, ("config.json: hidden_act is 'banana'",)),
    ({"pad_token_id": 512}, ("config.json: pad_token_id is 512, but vocab_size is 512",)),
    ({"rope_parameters": {"rope_type": "banana", "rope_theta": 1e4}}, ("rope_parameters.rope_type is 'banana'",)),
    ({"rope_parameters": {"rope_theta": 1e4, "factor": 4.0}}, ("rope_parameters.factor is 4.0", "'default'")),
    ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, ("config.json: Missing required keys", "factor")),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 10**40}}, ("rope_parameters.rope_theta",)),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": float("nan")}}, ("rope_parameters.rope_theta",)),
]


@pytest.mark.parametrize(("fields", "parts"), WRONG_CONFIGS, ids=[str(fields)[:50] for fields, _ in WRONG_CONFIGS])
def test_a_config_that_is_not_the_models(fields: dict[str, Any], parts: tuple[str, ...], directory: Path) -> None:
    edit_json(directory / "config.json", **fields)
    message = refusal(directory)
    for part in parts:
        assert part in message, message


def test_a_token_to_fill_up_with_that_no_row_is_looked_up_for(tokenizer: str, tmp_path: Path) -> None:
    gpt2 = save_family(tmp_path / "gpt2", tokenizer, "gpt2")
    edit_json(gpt2 / "config.json", pad_token_id=512)
    start(gpt2)


def test_a_byte_order_mark_is_passed_over(directory: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json"):
        (directory / name).write_bytes(b"\xef\xbb\xbf" + (directory / name).read_bytes())
    assert start(directory).info.name == "model"
    edit_json(directory / "config.json", num_hidden_layers=3)
    (directory / "tokenizer.json").write_bytes(b"\xef\xbb\xbf{}")
    assert "model.layers.2." in refusal(directory) or "tokenizer.json" in refusal(directory)


@pytest.mark.parametrize("has_generation_config", [True, False])
def test_only_end_tokens_that_a_file_names(has_generation_config: bool, directory: Path) -> None:
    """2 is the default of Llama's config."""
    if has_generation_config:
        edit_json(directory / "generation_config.json", eos_token_id=7)
    else:
        (directory / "generation_config.json").unlink()
    assert 2 in start(directory).info.eos_token_ids
    content = json.loads((directory / "config.json").read_text())
    del content["eos_token_id"]
    (directory / "config.json").write_text(json.dumps(content))
    edit_json(directory / "tokenizer_config.json", eos_token="<|endoftext|>")
    (directory / "chat_template.jinja").unlink(missing_ok=True)
    assert start(directory).info.eos_token_ids == ([0, 7] if has_generation_config else [0])


@pytest.mark.parametrize("field", ["eos_token_id", "bos_token_id", "pad_token_id"])
@pytest.mark.parametrize("value", ["2", [2, "0"], {"id": 2}, True, [[2]], 2.5])
def test_token_ids_that_are_none(field: str, value: Any, directory: Path) -> None:
    edit_json(directory / "generation_config.json", **{field: value})
    assert f"generation_config.json: {field} is {value!r}, but must be a token id" in refusal(directory)


@pytest.mark.parametrize("chosen", [0, 5])
def test_more_or_fewer_experts_than_there_are(chosen: int, tokenizer: str, tmp_path: Path) -> None:
    path = save_family(tmp_path / "mixtral", tokenizer, "mixtral")
    edit_json(path / "config.json", num_experts_per_tok=chosen)
    assert f"num_experts_per_tok is {chosen}, but must be from 1 to num_local_experts, 4" in refusal(path)


def test_files_that_are_no_models(directory: Path) -> None:
    (directory / "adapter_config.json").write_text("{}")
    assert "adapter_config.json" in refusal(directory)
    (directory / "config.json").rename(directory / "other.json")
    assert "adapter" in refusal(directory)


@pytest.mark.parametrize("content", ["{}", "[]", "{", '{"model": {"type": "BPE"}}'])
def test_a_tokenizer_that_is_none(content: str, directory: Path) -> None:
    (directory / "tokenizer.json").write_text(content)
    assert "tokenizer.json" in refusal(directory)


@pytest.mark.parametrize("name", ["special_tokens_map.json", "added_tokens.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", ["", "[]", "null"])
def test_files_beside_a_tokenizer_are_named(name: str, content: str, directory: Path) -> None:
    (directory / name).write_text(content)
    assert f"model/{name}: " in refusal(directory)


def test_a_chat_template_that_cannot_be_read(directory: Path) -> None:
    (directory / "chat_template.jinja").write_text("{% for message in messages %}\n{{ message.content }")
    assert "its chat template cannot be read: line 2: " in refusal(directory)
    (directory / "chat_template.jinja").unlink()
    edit_json(directory / "tokenizer_config.json", chat_template=5)
    assert "tokenizer_config.json: chat_template is 5" in refusal(directory)
    edit_json(directory / "tokenizer_config.json", chat_template="{{ raise_exception('not these') }}")
    start(directory)


def test_a_length_that_is_no_number(directory: Path) -> None:
    edit_json(directory / "tokenizer_config.json", model_max_length="512")
    assert "tokenizer_config.json: model_max_length is '512'" in refusal(directory)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json", "a.gguf"])
def test_what_git_leaves_without_its_large_files(name: str, directory: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4368439584\n"
    (directory / name).write_text(pointer)
    message = refusal(directory / name if name == "a.gguf" else directory)
    assert f"{name}: " in message
    assert "git lfs pull" in message


def test_a_directory_without_a_tokenizer(directory: Path) -> None:
    (directory / "tokenizer.json").unlink()
    assert "it has no tokenizer.json, and none can be made of its other files" in refusal(directory)


def test_weights_that_would_run_code(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    (directory / "pytorch_model.bin").write_bytes(b"\x80\x02cos\nsystem\nq\x00.")
    assert "a pickle of more than tensors, which is never run" in refusal(directory)


def test_a_tokenizer_with_its_own_code(directory: Path) -> None:
    edit_json(directory / "tokenizer_config.json", tokenizer_class="Own", auto_map={"AutoTokenizer": ["own.Own", None]})
    (directory / "own.py").write_text("raise SystemExit('it was run')")
    assert "never run" in refusal(directory)


def test_special_tokens_beyond_the_embedding(directory: Path) -> None:
    edit_json(directory / "tokenizer_config.json", eos_token="the very end")
    message = refusal(directory)
    assert "eos_token 'the very end'" in message
    assert "512 rows" in message
