"""GGUF files: what they say reaches the model or is refused by name, and a conversion is known by its whole content."""

from __future__ import annotations

import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file
from transformers import AutoConfig
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from softbatch.scheduler.model import gguf_conversion, gguf_tokenizer
from softbatch.scheduler.model import weights as weight_loading
from softbatch.scheduler.model.gguf_tokenizer import check_tokenizer
from softbatch.scheduler.model.model_files import check_config
from softbatch.scheduler.model.source import ModelError, resolve
from tests.support.engines import build, drain, make_request, tokens_of
from tests.support.gguf_files import (
    EXPERT_FEED_FORWARD,
    EXPERTS,
    HEAD_DIM,
    HIDDEN,
    LONGROPE,
    expert_numbers,
    expert_tensors,
    gpt2_numbers,
    gpt2_tensors,
    phi3_numbers,
    phi3_tensors,
    sentencepiece_fields,
    tensors,
    write_gguf,
)
from tests.support.models import load_reference
from tests.support.tokenizers_of_bytes import as_transformers, byte_fallback


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Seen(Exception):
    """What a conversion would be made with."""


def config_of(file: Path) -> Any:
    def accept(config: Any) -> None:
        raise Seen(config)

    with pytest.raises(Seen) as seen:
        resolve(str(file), accept)
    return seen.value.args[0]


def rope_of(file: Path) -> dict[str, Any]:
    return dict(config_of(file).rope_parameters)


def refusal(file: Path, cache: Path) -> str:
    with pytest.raises(ModelError) as refused:
        resolve(str(file), lambda config: check_config(config, None))
    assert "\n" not in str(refused.value)
    assert not [path for path in cache.rglob("*") if path.is_file() and path.parent.name != ".keys"]
    return str(refused.value)


def llama3_frequencies(factor: float, original: int) -> np.ndarray[Any, Any]:
    """What converters of Llama 3.1 and later write."""
    frequencies = 500000.0 ** -(np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    wavelengths = 2 * np.pi / frequencies
    smooth = (original / wavelengths - 1) / 3
    middle = 1 / ((1 - smooth) / factor + smooth)
    found = np.where(wavelengths < original / 4, 1.0, np.where(wavelengths > original, factor, middle))
    return found.astype(np.float32)


SCALED: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"type": "linear", "factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
    (
        {"type": "yarn", "factor": 4.0, "original_context_length": 4096, "finetuned": True},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096},
    ),
    ({"type": "none"}, {"rope_type": "default"}),
    ({"original_context_length": 4096}, {"rope_type": "default"}),
    ({"type": "linear", "factor": 2.0, "original_context_length": 4096}, {"rope_type": "linear", "factor": 2.0}),
]


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize(("said", "expected"), SCALED, ids=["-".join(map(str, said.values())) for said, _ in SCALED])
def test_scaled_positions_are_applied(said: dict[str, Any], expected: dict[str, Any], tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "a.gguf", {f"llama.rope.scaling.{name}": value for name, value in said.items()})
    parameters = rope_of(file)
    assert parameters == parameters | expected | {"rope_theta": 10000.0}


@pytest.mark.usefixtures("cache")
def test_frequencies_in_a_tensor_are_applied(tmp_path: Path) -> None:
    weights = tensors() | {"rope_freqs.weight": llama3_frequencies(2.0, 8192)}
    parameters = rope_of(write_gguf(tmp_path / "a.gguf", {"llama.rope.freq_base": 500000.0}, weights))
    assert (parameters["rope_type"], parameters["factor"]) == ("llama3", 2.0)
    assert parameters["original_max_position_embeddings"] == 8192


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize(("said", "expected"), [(0, None), (2047, 2047)])
def test_a_window_is_taken_from_the_file(said: int, expected: int | None, tmp_path: Path) -> None:
    """0 is no window; Phi-3's converters write it, and the original length of models without scaled positions."""
    numbers = phi3_numbers() | {"phi3.attention.sliding_window": said, "phi3.rope.scaling.original_context_length": 64}
    assert config_of(write_gguf(tmp_path / "a.gguf", numbers, architecture="phi3")).sliding_window == expected


@pytest.mark.usefixtures("cache")
def test_factors_of_both_lengths_are_applied(tmp_path: Path) -> None:
    """The conversion turns positions as the file says, in short sequences and in long ones, and is served so."""
    file = write_gguf(tmp_path / "a.gguf", phi3_numbers() | LONGROPE, phi3_tensors(), "phi3")
    path = resolve(str(file)).path
    config = AutoConfig.from_pretrained(path)
    assert config.original_max_position_embeddings == 40
    expected = {"rope_type": "longrope", "short_factor": [1.0, 1.25], "long_factor": [3.0, 9.5]}
    expected |= {"original_max_position_embeddings": 40, "partial_rotary_factor": 0.5, "rope_theta": 10000.0}
    parameters = dict(config.rope_parameters)
    assert parameters.pop("attention_factor") == pytest.approx(1.19)
    assert parameters == parameters | expected
    engine, ready = build(path, num_blocks=24)
    assert ready.model.max_model_len == 256
    reference = load_reference(path)
    prompts = [list(range(3, 3 + length)) for length in (30, 60)]
    outputs = drain(engine, [make_request(f"r{len(ids)}", ids, max_tokens=15) for ids in prompts])
    for ids in prompts:
        assert tokens_of(outputs[f"r{len(ids)}"]) == reference.generate(ids, 15)


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("feed_forward", [4 * HIDDEN, 3 * HIDDEN])
def test_gpt2_is_converted(feed_forward: int, tmp_path: Path) -> None:
    numbers = gpt2_numbers() | {"gpt2.feed_forward_length": feed_forward}
    path = Path(resolve(str(write_gguf(tmp_path / "a.gguf", numbers, gpt2_tensors(feed_forward), "gpt2"))).path)
    assert load_file(path / "model.safetensors")["transformer.h.0.mlp.c_fc.weight"].shape == (HIDDEN, feed_forward)


def test_what_the_config_has_no_place_for_is_refused(cache: Path, tmp_path: Path) -> None:
    """Before anything is converted: nothing is left behind."""
    cases: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        (
            {"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 4.0},
            {},
            "rope.scaling.type = 'longrope'",
        ),
        ({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.yarn_log_multiplier": 0.1}, {}, "yarn_log_multiplier"),
        ({}, {"rope_freqs.weight": np.array([1, 3, 9, 4], dtype=np.float32)}, "rope_freqs.weight"),
        ({}, {"rope_factors_long.weight": np.ones(4, dtype=np.float32)}, "original_context_length = None"),
        (
            {"llama.rope.scaling.original_context_length": 64},
            {"rope_factors_long.weight": np.ones(4, dtype=np.float32)},
            "no tensor rope_factors_short.weight",
        ),
        (
            {"llama.rope.scaling.original_context_length": 64},
            dict.fromkeys(("rope_factors_long.weight", "rope_factors_short.weight"), np.ones(3, dtype=np.float32)),
            "factor is '3 entries', but must be 4 numbers above 0",
        ),
        (
            {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.original_context_length": 64},
            {"rope_factors_long.weight": np.ones(4, dtype=np.float32)},
            "(longrope) and llama.rope.scaling.type = 'yarn': not supported",
        ),
        ({"llama.attention.clamp_kqv": 8.0}, {}, "llama.attention.clamp_kqv = 8.0"),
        ({"llama.attention.value_length": 16}, {}, "llama.attention.value_length = 16"),
        ({"split.count": 2}, {}, "split.count"),
        (
            {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0},
            {},
            "llama.rope.scaling.original_context_length = None",
        ),
        ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": "4"}, {}, "factor = '4'"),
        ({"llama.rope.freq_base": "high"}, {}, "'high'"),
        ({"llama.attention.head_count_kv": [2, 1]}, {}, "num_key_value_heads: "),
        ({"llama.attention.layer_norm_rms_epsilon": "small"}, {}, "small"),
        ({"llama.attention.sliding_window": 512}, {}, "llama.attention.sliding_window = 512"),
        ({"tokenizer.ggml.pre": "kimi-k2"}, {}, "tokenizer.ggml.pre = 'kimi-k2'"),
    ]
    for index, (fields, more, named) in enumerate(cases):
        file = write_gguf(tmp_path / f"{index}.gguf", fields, tensors() | more)
        assert named in refusal(file, cache)


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize(("name", "called"), [("A.GGUF", "A"), ("sha256-4a.b", "sha256-4a.b")])
def test_a_file_is_known_by_its_content(name: str, called: str, tmp_path: Path) -> None:
    """Whatever its suffix, or without one, as in stores of other programs."""
    source = resolve(str(write_gguf(tmp_path / name)))
    assert (source.name, Path(source.path, "config.json").is_file()) == (called, True)


@pytest.mark.parametrize("has_config", [True, False])
def test_a_directory_around_a_file_names_it(has_config: bool, cache: Path, tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "a.Q4_K_M.gguf")
    if has_config:
        (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=f"--model {file}"):
        resolve(str(tmp_path))
    (tmp_path / "notes").write_text("GGUF? No.")
    with pytest.raises(ModelError, match="neither"):
        resolve(str(tmp_path / "b"))


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("adds", [True, False])
def test_texts_begin_and_end_as_the_file_says(adds: bool, tmp_path: Path) -> None:
    numbers = {f"tokenizer.ggml.add_{name}_token": adds for name in ("bos", "eos")}
    source = resolve(str(write_gguf(tmp_path / "a.gguf", numbers)))
    assert (source.tokenizer.encode("a")[0] == source.tokenizer.bos_token_id) == adds
    assert (source.tokenizer.encode("a")[-1] == source.tokenizer.eos_token_id) == adds


CUT = "\n\n1, a  12 = 3456"
CUTS = {
    "gpt-2": ["\n", "\n", "1", ",", " a", " ", " 12", " =", " 3456"],
    "smollm": ["\n\n", "1", ",", " a", "  ", "1", "2", " =", " ", "3", "4", "5", "6"],
    "starcoder": ["\n\n", "1", ",", " a", "  ", "1", "2", " =", " ", "3", "4", "5", "6"],
    "default": ["\n", "\n", "1", ",", " a", " ", " ", "12", " ", "=", " ", "345", "6"],
}


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("cut", CUTS)
def test_texts_are_cut_as_the_file_says(cut: str, architecture: str, tmp_path: Path) -> None:
    """Also where the architecture has a class of tokenizers that cuts in its own way."""
    said = {"tokenizer.ggml.pre": cut} | (gpt2_numbers() if architecture == "gpt2" else {})
    weights = gpt2_tensors(4 * HIDDEN) if architecture == "gpt2" else None
    backend = resolve(str(write_gguf(tmp_path / "a.gguf", said, weights, architecture))).tokenizer.backend_tokenizer
    assert [CUT[slice(*place)] for _, place in backend.pre_tokenizer.pre_tokenize_str(CUT)] == CUTS[cut]
    if cut == "smollm":
        assert backend.encode("    1").tokens == ["ĠĠĠĠ", "1"]


# Contractions, digits, CJK beside Latin letters, signs, ends of lines and spaces.
MIXED = "It's WE'LL 12345円, 日本a!\n\n  x_1"
_START, _ONE_BY_ONE = ["It", "'s", " WE", "'LL", " "], ["1", "2", "3", "4", "5"]
_END = [" ", " x", "_", "1"]
CUTS_OF_MIXED = {
    "glm4": [*_START, "123", "45", "円", ",", " 日本a", "!\n\n", *_END],
    "stablelm2": [*_START, *_ONE_BY_ONE, "円", ",", " 日本a", "!\n\n", *_END],
    "seed-coder": [*_START, *_ONE_BY_ONE, "円", ",", " 日本a", "!", "\n\n", *_END],
    "minicpm5": [*_START, "123", "45", "円", ",", " 日本a", "!\n\n", *_END],
    "deepseek-v3": [*_START, "123", "45", "円", ",", " ", "日本", "a", "!\n\n", *_END],
    "deepseek-coder": [
        *["It", "'", "s", " WE", "'", "LL", " ", *_ONE_BY_ONE, "円", ",", " ", "日本", "a", "!", "\n", "\n"],
        *_END,
    ],
}


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("cut", CUTS_OF_MIXED)
def test_texts_of_any_kind_are_cut_as_the_file_says(cut: str, tmp_path: Path) -> None:
    backend = resolve(str(write_gguf(tmp_path / "a.gguf", {"tokenizer.ggml.pre": cut}))).tokenizer.backend_tokenizer
    found = [MIXED[slice(*place)] for _, place in backend.pre_tokenizer.pre_tokenize_str(MIXED)]
    assert found == CUTS_OF_MIXED[cut]


def test_kinds_that_cut_alike_have_one_expression() -> None:
    """Those that transformers has are the same."""
    assert gguf_tokenizer._CUTS["glm4"] == (GGUF_PRE_TOKENIZER_SPLITS["llama-bpe"],)
    assert gguf_tokenizer._CUTS["stablelm2"] == (GGUF_PRE_TOKENIZER_SPLITS["qwen2"],)


@pytest.mark.usefixtures("cache")
def test_a_space_is_put_first_unless_the_file_says_no(tmp_path: Path) -> None:
    """Without one, what is decoded keeps the spaces that it begins with."""
    for says, first in ((True, ["▁hello"]), (False, [*"hello"])):
        said = sentencepiece_fields() | {"tokenizer.ggml.add_space_prefix": says}
        tokenizer = resolve(str(write_gguf(tmp_path / f"{says}.gguf", said))).tokenizer
        for text, tokens in (("hello", first), (" hello  hello", ["▁hello", "▁▁", *"hello"])):
            found = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
            assert found.tokens == tokens
            assert tokenizer.decode(found.ids) == (text.removeprefix(" ") if says else text)


@pytest.mark.usefixtures("cache")
def test_what_older_code_has_made_of_a_file_is_not_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_gguf(tmp_path / "a.gguf")
    os.utime(file, (1_700_000_000, 1_700_000_000))
    monkeypatch.setattr(gguf_conversion, "_SETTLED_SECONDS", -1.0)  # the key is remembered at once
    version = gguf_conversion._VERSION
    monkeypatch.setattr(gguf_conversion, "_VERSION", version - 1)
    old = resolve(str(file)).path
    assert resolve(str(file)).path == old
    monkeypatch.setattr(gguf_conversion, "_VERSION", version)
    assert resolve(str(file)).path != old


def test_a_tokenizer_is_refused_before_weights_are_read(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reads(*_: object, **__: object) -> None:
        raise Seen

    monkeypatch.setattr(weight_loading, "load_weights", reads)
    assert "add_bos_token = 2" in refusal(write_gguf(tmp_path / "a.gguf", {"tokenizer.ggml.add_bos_token": 2}), cache)


def test_a_tokenizer_that_puts_a_space_first_is_not_one_without() -> None:
    def check(said: dict[str, Any], *, strip: bool) -> None:
        fields = {"model": "llama"} | said
        check_tokenizer(as_transformers(byte_fallback(strip=strip)), fields.get)

    check({}, strip=True)
    check({"add_space_prefix": True}, strip=True)
    check({"add_space_prefix": False}, strip=False)
    with pytest.raises(ModelError, match=r"tokenizer\.ggml\.add_space_prefix = False, but transformers makes one that"):
        check({"add_space_prefix": False}, strip=True)


def test_other_tensors_than_the_model_has_are_refused(cache: Path, tmp_path: Path) -> None:
    whole = tensors()
    lacking = {name: tensor for name, tensor in whole.items() if name != "blk.1.ffn_up.weight"}
    assert "lacks model.layers.1.mlp.up_proj.weight" in refusal(write_gguf(tmp_path / "a.gguf", weights=lacking), cache)
    more = whole | {"blk.0.attn_q.bias": np.ones(32, dtype=np.float32)}
    assert "has blk.0.attn_q.bias" in refusal(write_gguf(tmp_path / "b.gguf", weights=more), cache)


@pytest.mark.usefixtures("cache")
def test_experts_are_converted(tmp_path: Path) -> None:
    """All of them, and each into its own place."""
    weights = expert_tensors()
    path = Path(resolve(str(write_gguf(tmp_path / "a.gguf", expert_numbers(), weights, "qwen3moe"))).path)
    assert json.loads((path / "config.json").read_text())["moe_intermediate_size"] == EXPERT_FEED_FORWARD
    found = load_file(path / "model.safetensors")
    for expert in range(EXPERTS):
        for kind in ("gate", "up", "down"):
            tensor = found[f"model.layers.1.mlp.experts.{expert}.{kind}_proj.weight"]
            expected = weights[f"blk.1.ffn_{kind}_exps.weight"][expert]
            np.testing.assert_allclose(tensor.float().numpy(), expected, rtol=0.01)


def test_tensors_beside_experts_are_refused(cache: Path, tmp_path: Path) -> None:
    weights = expert_tensors() | {"blk.0.ffn_up_exps.bias": np.ones((4, 16), dtype=np.float32)}
    assert "has blk.0.ffn_up_exps.bias" in refusal(
        write_gguf(tmp_path / "a.gguf", expert_numbers(), weights, "qwen3moe"), cache
    )


def test_half_a_file_is_refused(cache: Path, tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "a.gguf")
    os.truncate(file, file.stat().st_size * 9 // 10)
    message = refusal(file, cache)
    assert "not a whole GGUF file" in message or "the file ends at" in message


@pytest.mark.usefixtures("cache")
def test_a_file_that_changes_in_place_is_converted_anew(tmp_path: Path) -> None:
    """A byte in its middle, same size, same time of change: as an editor of metadata may leave it."""
    file = write_gguf(tmp_path / "a.gguf")
    os.utime(file, (1_700_000_000, 1_700_000_000))
    first = resolve(str(file)).path
    assert json.loads((Path(first) / "config.json").read_text())["tie_word_embeddings"]
    assert resolve(str(file)).path == first
    with file.open("r+b") as opened:
        opened.seek(file.stat().st_size // 2)
        byte = opened.read(1)
        opened.seek(-1, os.SEEK_CUR)
        opened.write(bytes([byte[0] ^ 1]))
    os.utime(file, (1_700_000_000, 1_700_000_000))
    assert resolve(str(file)).path != first


@pytest.mark.usefixtures("cache")
def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    """Its first read fails, whoever asks."""
    (tmp_path / "a.gguf").symlink_to("/proc/self/mem")
    with pytest.raises(ModelError, match=r"--model \S*a\.gguf: .*error"):
        resolve(str(tmp_path / "a.gguf"))


def test_what_a_killed_conversion_left_is_removed(cache: Path, tmp_path: Path) -> None:
    left = cache / "softbatch" / "models" / ".converting-killed"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    made = Path(resolve(str(write_gguf(tmp_path / "a.gguf"))).path)
    assert sorted(path.name for path in made.parent.iterdir()) == [".keys", made.name]


def test_two_starts_convert_once(cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = str(write_gguf(tmp_path / "a.gguf"))
    caplog.set_level("INFO")
    together = threading.Barrier(2)
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(lambda _: resolve(file, lambda _: together.wait(30) and None), range(2)))
    assert found[0] == found[1]
    assert [record.message.split(" ")[0] for record in caplog.records].count("converted") == 1


@pytest.mark.usefixtures("cache")
def test_a_file_that_is_replaced_while_it_is_converted(tmp_path: Path) -> None:
    """What was made of the new one must not be kept under the old one's content."""
    file, other = write_gguf(tmp_path / "a.gguf"), write_gguf(tmp_path / "b.gguf", {"llama.context_length": 64})
    with pytest.raises(ModelError, match="changed while it was converted"):
        resolve(str(file), lambda _: other.replace(file) and None)
    assert Path(resolve(str(file)).path, "config.json").is_file()
